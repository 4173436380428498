//! One worker per virtqueue: pop, parse, plan, read, finish.
