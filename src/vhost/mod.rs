//! vhost-user: the messages of one front-end start and stop queues.
