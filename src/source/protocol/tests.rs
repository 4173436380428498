//! Messages there and back, and what is refused.

use super::*;

fn requests() -> Vec<Request> {
    let fetch = |cause| Request::Fetch {
        ticket: 7,
        blob: 3,
        offset: 1 << 40,
        len: MAX_FETCH,
        cause,
    };
    let mut all = vec![Request::Open { blob: u32::MAX }, Request::Count];
    all.extend(Cause::ALL.map(fetch));
    all
}

fn replies() -> Vec<Reply> {
    let mut counts = Counts::default();
    counts
        .iter_mut()
        .zip(1..)
        .for_each(|(count, number)| *count = number << 40);
    let mut all = vec![
        Reply::Hello,
        Reply::Ready { ticket: u64::MAX },
        Reply::Counts(counts),
    ];
    for complete in [false, true] {
        let (blob, len) = (5, 1 << 41);
        all.push(Reply::Opened {
            blob,
            len,
            complete,
        });
    }
    for kind in FAILURES {
        for subject in [Subject::Blob(2), Subject::Ticket(9)] {
            let reason = "r.example does not have it".to_owned();
            all.push(Reply::Failed {
                subject,
                kind,
                reason,
            });
        }
    }
    all
}

#[test]
fn what_is_encoded_is_decoded() {
    for request in requests() {
        assert_eq!(Request::decode(&request.encode()), Ok(request));
        assert!(Reply::decode(&request.encode()).is_err());
    }
    for reply in replies() {
        assert_eq!(Reply::decode(&reply.encode()), Ok(reply.clone()));
        assert!(Request::decode(&reply.encode()).is_err());
    }
}

#[test]
fn long_reasons_are_cut_at_a_character() {
    let reply = Reply::Failed {
        subject: Subject::Ticket(1),
        kind: FetchErrorKind::System,
        reason: format!("x{}", "ü".repeat(200)),
    };
    let Reply::Failed { reason, .. } = Reply::decode(&reply.encode()).unwrap() else {
        panic!("another kind");
    };
    assert_eq!(reason, format!("x{}", "ü".repeat(103)));
}

#[test]
fn every_byte_counts() {
    let packets = requests().into_iter().map(|request| request.encode());
    let packets = packets.chain(replies().into_iter().map(|reply| reply.encode()));
    for packet in packets {
        for (at, _) in packet.iter().enumerate() {
            let mut other = packet;
            other[at] ^= 0x80;
            let request = Request::decode(&other).map(|request| request.encode());
            let reply = Reply::decode(&other).map(|reply| reply.encode());
            for found in [request, reply].into_iter().flatten() {
                assert_eq!(found, other);
            }
        }
        assert!(Request::decode(&packet[..255]).is_err());
        assert!(Reply::decode(&[packet.as_slice(), &[0]].concat()).is_err());
    }
}

#[test]
fn absurd_ranges_are_refused() {
    for (offset, len) in [(0, 0), (0, MAX_FETCH + 1), (u64::MAX, 1), (u64::MAX - 5, 6)] {
        let request = Request::Fetch {
            ticket: 0,
            blob: 0,
            offset,
            len,
            cause: Cause::Demand,
        };
        assert!(
            Request::decode(&request.encode()).is_err(),
            "{offset}+{len}"
        );
    }
}
