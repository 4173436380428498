//! The recorder of a disk's reads. One recording at a time uses it: one for a file, from the start of the daemon on, or
//! one of the control API, while the disk is served.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::format::trace::TracedRead;
use crate::image::{Image, OpenStack};
use crate::source::recorder::Recorder;

/// What a recording is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A file that the command line or the image config names.
    File,
    /// A client of the control API.
    Client,
}

/// The recorder of a disk's reads.
#[derive(Debug, Default)]
pub struct DiskRecorder {
    recorder: Arc<Recorder>,
    /// The recording under way.
    recording: Mutex<Option<Purpose>>,
}

impl DiskRecorder {
    /// Starts a recording for a file before the layers are loaded: what loading reads is part of the trace.
    pub(super) fn start_loading(&self, files: &OpenStack) {
        *self.recording() = Some(Purpose::File);
        files.start_recording(&self.recorder);
    }

    /// Starts a recording for a client. Discards one that another client started. Returns false, and changes nothing, if
    /// a trace is recorded for a file.
    pub fn start(&self, image: &Image) -> bool {
        let mut recording = self.recording();
        if *recording == Some(Purpose::File) {
            return false;
        }
        *recording = Some(Purpose::Client);
        image.stop_recording();
        self.recorder.clear();
        image.start_recording(&self.recorder);
        true
    }

    /// Ends the recording for this purpose, and returns the reads. Returns `None` if there is no such recording.
    pub fn finish(&self, image: &Image, purpose: Purpose) -> Option<Vec<TracedRead>> {
        let mut recording = self.recording();
        recording.take_if(|current| *current == purpose)?;
        image.stop_recording();
        Some(image.traced(&self.recorder.units()))
    }

    fn recording(&self) -> MutexGuard<'_, Option<Purpose>> {
        self.recording
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
