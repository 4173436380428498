//! Whole blobs, asked for at once and in the background.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use super::{FillError, FillOptions};
use crate::cache::Cache;
use crate::fetch::Download;
use crate::fetch::tests::{Answer, DEADLINE, Fake, Setup, denied, passing, until};
use crate::format::digest::Digest;
use crate::format::presence::UNIT;
use crate::source::link;

fn fill(setup: &Setup) -> Result<(), FillError> {
    let options = FillOptions {
        parallel: 3,
        block_size: 1 << 20,
        rate: None,
        patience: Some(DEADLINE),
        within_limits: false,
    };
    setup
        .fetcher
        .fill(&setup.offer(), options, &mut |_| ControlFlow::Continue(()))
}

#[test]
fn a_whole_blob_is_fetched_and_verified() {
    let setup = Setup::new(Fake::new(50 * UNIT + 7));
    fill(&setup).unwrap();
    let cache = Cache::open(&setup.dir.path().join("cache")).unwrap();
    let digest = Digest::of(&setup.fake.bytes);
    assert_eq!(cache.verify(&digest).unwrap(), Some(true));
    let requests = setup.fake.asked().len();
    fill(&setup).unwrap();
    assert_eq!(setup.fake.asked().len(), requests);
}

#[test]
fn a_wrong_digest_is_fetched_once_more_and_then_reported() {
    let setup = Setup::new(Fake::new(5 * UNIT).script([Answer::Flip]));
    fill(&setup).unwrap();
    let setup = Setup::new(Fake::new(5 * UNIT).script([Answer::Flip, Answer::Flip]));
    let error = fill(&setup).unwrap_err();
    assert!(matches!(error, FillError::Mismatch { .. }), "{error}");
    let setup = Setup::new(Fake::new(5 * UNIT).script([Answer::Fail(denied())]));
    let error = fill(&setup).unwrap_err();
    assert!(matches!(error, FillError::Fetch { .. }), "{error}");
}

#[test]
fn a_disk_is_downloaded_in_the_background_until_it_is_gone() {
    let setup = Setup::new(Fake::new(60 * UNIT + 1).script([passing(), Answer::Fail(denied())]));
    let (ours, theirs) = link::pair().unwrap();
    let download = Download {
        delay: Duration::from_millis(1),
        delay_extra: Duration::ZERO,
        attempts: 3,
        ..Download::default()
    };
    let offers = vec![setup.offer()];
    setup
        .fetcher
        .attach(theirs, offers, Some(download))
        .unwrap();
    until("published", || {
        setup.fetcher.counters().published == 1 || {
            let cache = Cache::open(&setup.dir.path().join("cache")).unwrap();
            cache.verify(&Digest::of(&setup.fake.bytes)).unwrap() == Some(true)
        }
    });
    let all = setup.fake.bytes.len() as u64;
    assert_eq!(setup.fetcher.counters().background_bytes, all);
    drop(ours);
    // A disk that is gone before the delay is over.
    let setup = Setup::new(Fake::new(UNIT));
    let (ours, theirs) = link::pair().unwrap();
    let download = Download {
        delay: Duration::from_secs(3600),
        ..download
    };
    let offers = vec![setup.offer()];
    setup
        .fetcher
        .attach(theirs, offers, Some(download))
        .unwrap();
    drop(ours);
    until("nothing holds the origin but this", || {
        Arc::strong_count(&setup.fake) == 1
    });
    assert!(setup.fake.asked().is_empty());
}
