//! What the guest says: its memory, virtqueues, descriptor chains and block requests.
