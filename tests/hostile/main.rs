//! The daemon with guests, front-ends and storage that misbehave.

mod descriptors;
mod exhaustion;
mod frontend;
mod guest;
mod limits;
mod storage_faults;
mod unanswered_files;
