//! Jobs, waiters and failures, without I/O.

use super::*;
use crate::source::FetchErrorKind;

type Test = Schedule<&'static str>;

const BLOB: BlobId = BlobId(0);

const CLIENT: ClientId = ClientId(0);

fn units(start: u64, end: u64) -> UnitRange {
    UnitRange::new(start, end)
}

fn next(schedule: &mut Test, urgencies: &[Urgency], size: u64) -> Option<RangeFetch> {
    // Units from 1000 on are present.
    schedule.next(urgencies, |_, _| size, |_, unit| unit < 1000)
}

fn job(units: UnitRange, cause: Cause) -> Option<RangeFetch> {
    let blob = BLOB;
    let elsewhere = None;
    Some(RangeFetch {
        client: CLIENT,
        blob,
        units,
        cause,
        elsewhere,
    })
}

fn passing() -> Failure {
    Failure::passing(FetchErrorKind::Unreachable, "not now")
}

fn refused() -> Failure {
    Failure::definite(FetchErrorKind::Unauthorized, "no")
}

#[test]
fn demand_goes_first_and_takes_no_unit_that_is_not_wanted() {
    let mut schedule = Test::default();
    schedule.want(CLIENT, BLOB, &[units(500, 520)], Cause::Background, None);
    schedule.want(CLIENT, BLOB, &[units(100, 110)], Cause::ReadAhead, None);
    schedule.want(CLIENT, BLOB, &[units(50, 52)], Cause::Replay, None);
    schedule.want(CLIENT, BLOB, &[units(7, 8)], Cause::Demand, Some("a"));
    let all = &Urgency::ALL;
    assert_eq!(next(&mut schedule, all, 4), job(units(7, 8), Cause::Demand));
    assert_eq!(
        next(&mut schedule, all, 4),
        job(units(50, 52), Cause::Replay)
    );
    assert_eq!(
        next(&mut schedule, all, 64),
        job(units(100, 110), Cause::ReadAhead)
    );
    assert_eq!(next(&mut schedule, &Urgency::ALL[..3], 64), None);
    assert_eq!(
        next(&mut schedule, all, 16),
        job(units(500, 516), Cause::Background)
    );
    assert_eq!(
        next(&mut schedule, all, 16),
        job(units(516, 520), Cause::Background)
    );
    assert_eq!(next(&mut schedule, all, 16), None);
    assert!(schedule.arrived(BLOB, units(0, 7)).is_empty());
    assert_eq!(schedule.arrived(BLOB, units(7, 8)), ["a"]);
}

#[test]
fn what_is_in_flight_is_not_asked_for_again() {
    let mut schedule = Test::default();
    schedule.want(CLIENT, BLOB, &[units(0, 8)], Cause::ReadAhead, None);
    next(&mut schedule, &Urgency::ALL, 8).unwrap();
    schedule.want(CLIENT, BLOB, &[units(4, 10)], Cause::Demand, Some("a"));
    schedule.want(CLIENT, BLOB, &[units(4, 6)], Cause::Demand, Some("b"));
    assert_eq!(
        next(&mut schedule, &Urgency::ALL, 2),
        job(units(8, 10), Cause::Demand)
    );
    assert_eq!(next(&mut schedule, &Urgency::ALL, 2), None);
    assert!(schedule.arrived(BLOB, units(0, 5)).is_empty());
    assert_eq!(schedule.arrived(BLOB, units(5, 6)), ["b"]);
    assert!(schedule.arrived(BLOB, units(8, 10)).is_empty());
    assert_eq!(schedule.waiting(), 1);
    assert_eq!(schedule.arrived(BLOB, units(6, 8)), ["a"]);
    assert!(schedule.blobs.is_empty());
}

#[test]
fn a_hint_becomes_urgent_when_something_waits_for_it() {
    let mut schedule = Test::default();
    schedule.want(CLIENT, BLOB, &[units(0, 100)], Cause::Background, None);
    schedule.want(CLIENT, BLOB, &[units(50, 51)], Cause::Demand, Some("a"));
    assert_eq!(
        next(&mut schedule, &Urgency::ALL, 2),
        job(units(50, 52), Cause::Demand)
    );
    assert_eq!(
        next(&mut schedule, &Urgency::ALL, 200),
        job(units(0, 50), Cause::Background)
    );
    assert_eq!(
        next(&mut schedule, &Urgency::ALL, 200),
        job(units(52, 100), Cause::Background)
    );
}

#[test]
fn small_gaps_are_fetched_as_well_unless_something_waits() {
    let mut schedule = Test::default();
    let runs = [units(998, 1001), units(1002, 1004), units(1006, 1007)];
    schedule.want(CLIENT, BLOB, &runs, Cause::Replay, None);
    assert_eq!(
        next(&mut schedule, &Urgency::ALL, 64),
        job(units(998, 1004), Cause::Replay)
    );
    assert_eq!(
        next(&mut schedule, &Urgency::ALL, 64),
        job(units(1006, 1007), Cause::Replay)
    );
    let mut schedule = Test::default();
    schedule.want(
        CLIENT,
        BLOB,
        &[units(996, 1000), units(1001, 1002)],
        Cause::Demand,
        Some("a"),
    );
    let demand = next(&mut schedule, &Urgency::ALL, 64);
    assert_eq!(demand, job(units(996, 1000), Cause::Demand));
}

#[test]
fn repairs_come_alone() {
    let mut schedule = Test::default();
    schedule.want(CLIENT, BLOB, &[units(1000, 1002)], Cause::Repair, Some("a"));
    schedule.want(CLIENT, BLOB, &[units(1002, 1003)], Cause::Demand, Some("b"));
    let repair = next(&mut schedule, &Urgency::ALL, 64).unwrap();
    assert_eq!(
        (repair.units, repair.overwrites()),
        (units(1000, 1002), true)
    );
    let demand = next(&mut schedule, &Urgency::ALL, 64).unwrap();
    assert_eq!(
        (demand.units, demand.overwrites()),
        (units(1002, 1003), false)
    );
}

#[test]
fn a_failure_is_repeated_while_something_waits() {
    let mut schedule = Test::default();
    let now = Instant::now();
    let later = now + Duration::from_secs(1);
    schedule.want(CLIENT, BLOB, &[units(0, 4)], Cause::Demand, Some("guest"));
    let failed = next(&mut schedule, &Urgency::ALL, 4).unwrap();
    assert_eq!(failed.units, units(0, 4));
    schedule.want(CLIENT, BLOB, &[units(1, 2)], Cause::Start, Some("opening"));
    assert!(schedule.failed(&failed, &passing(), later).is_empty());
    assert_eq!(schedule.wake(now), Some(later));
    assert_eq!(next(&mut schedule, &Urgency::ALL, 4), None);
    assert_eq!(schedule.wake(later), None);
    let failed = next(&mut schedule, &Urgency::ALL, 4).unwrap();
    assert_eq!(failed.units, units(0, 4));
    assert_eq!(schedule.failed(&failed, &refused(), later), ["opening"]);
    schedule.wake(later);
    assert_eq!(
        next(&mut schedule, &Urgency::ALL, 4),
        job(units(0, 4), Cause::Demand)
    );
    assert_eq!(schedule.arrived(BLOB, units(0, 4)), ["guest"]);
    assert!(schedule.blobs.is_empty());
}

#[test]
fn an_opening_learns_why_it_waited_in_vain() {
    let mut schedule = Test::default();
    schedule.want(CLIENT, BLOB, &[units(0, 1)], Cause::Start, Some("opening"));
    schedule.want(CLIENT, BLOB, &[units(0, 1)], Cause::Demand, Some("guest"));
    let job = next(&mut schedule, &Urgency::ALL, 4).unwrap();
    let soon = Instant::now();
    assert!(schedule.failed(&job, &passing(), soon).is_empty());
    schedule.wake(soon);
    let job = next(&mut schedule, &Urgency::ALL, 4).unwrap();
    let late = Instant::now() + PATIENCE;
    assert_eq!(schedule.failed(&job, &passing(), late), ["opening"]);
    assert_eq!(schedule.waiting(), 1);
}

#[test]
fn a_failure_that_ends_a_start_is_waited_out_by_all_others() {
    let unnamed = Failure {
        ends_start: true,
        ..passing()
    };
    let mut schedule = Test::default();
    for (cause, name) in [
        (Cause::Start, "opening"),
        (Cause::Read, "tool"),
        (Cause::Demand, "guest"),
    ] {
        schedule.want(CLIENT, BLOB, &[units(0, 1)], cause, Some(name));
    }
    let job = next(&mut schedule, &Urgency::ALL, 4).unwrap();
    let soon = Instant::now();
    assert_eq!(schedule.failed(&job, &unnamed, soon), ["opening"]);
    assert_eq!(schedule.failed(&job, &refused(), soon), ["tool"]);
    assert_eq!(schedule.waiting(), 1);
}

#[test]
fn no_attempt_begins_that_would_end_too_late() {
    let mut schedule = Test::default();
    schedule.want(CLIENT, BLOB, &[units(0, 1)], Cause::Start, Some("opening"));
    let job = next(&mut schedule, &Urgency::ALL, 4).unwrap();
    let late = Instant::now() + PATIENCE - ATTEMPT;
    let almost = late - Duration::from_secs(1);
    assert!(schedule.failed(&job, &passing(), almost).is_empty());
    let later = late + Duration::from_secs(1);
    assert_eq!(schedule.failed(&job, &passing(), later), ["opening"]);
}

#[test]
fn hints_are_not_repeated_and_have_a_limit() {
    let mut schedule = Test::default();
    let now = Instant::now();
    schedule.want(CLIENT, BLOB, &[units(0, 4)], Cause::ReadAhead, None);
    let failed = next(&mut schedule, &Urgency::ALL, 4).unwrap();
    schedule.failed(&failed, &passing(), now);
    schedule.wake(now);
    assert_eq!(next(&mut schedule, &Urgency::ALL, 4), None);
    for unit in 0..2 * MAX_HINTS as u64 {
        let unit = unit * 2;
        schedule.want(
            CLIENT,
            BLOB,
            &[UnitRange::one(unit)],
            Cause::ReadAhead,
            None,
        );
    }
    assert_eq!(
        schedule.queues[Urgency::ReadAhead as usize].len_of(CLIENT),
        MAX_HINTS
    );
}

#[test]
fn a_postponed_job_keeps_its_units() {
    let mut schedule = Test::default();
    let now = Instant::now();
    schedule.want(CLIENT, BLOB, &[units(0, 2)], Cause::Background, Some("a"));
    let job = next(&mut schedule, &Urgency::ALL, 4).unwrap();
    schedule.postpone(&job, now);
    schedule.arrived(BLOB, units(0, 1));
    schedule.wake(now);
    assert_eq!(
        next(&mut schedule, &Urgency::ALL, 4).unwrap().units,
        units(1, 2)
    );
    assert_eq!(schedule.arrived(BLOB, units(1, 2)), ["a"]);
}

#[test]
fn waiters_can_be_dropped_and_a_blob_abandoned() {
    let mut schedule = Test::default();
    schedule.want(CLIENT, BLOB, &[units(0, 2)], Cause::Demand, Some("a"));
    schedule.want(CLIENT, BLOB, &[units(0, 2)], Cause::Demand, Some("b"));
    schedule.forget(CLIENT, |name| *name == "a");
    assert_eq!(schedule.abandon(BLOB), ["b"]);
    assert_eq!(next(&mut schedule, &Urgency::ALL, 4), None);
}

#[test]
fn an_answer_ends_the_pauses_of_its_blob() {
    let mut schedule = Test::default();
    let now = Instant::now();
    let later = now + Duration::from_secs(30);
    let asked = Failure {
        retry_after: Some(Duration::from_secs(30)),
        ..passing()
    };
    for (unit, failure) in [(1, passing()), (2, asked), (3, refused())] {
        schedule.want(
            CLIENT,
            BLOB,
            &[units(unit, unit + 1)],
            Cause::Demand,
            Some("a"),
        );
        let fetch = next(&mut schedule, &Urgency::ALL, 1).unwrap();
        schedule.failed(&fetch, &failure, later);
    }
    schedule.hurry(BlobId(1), now);
    schedule.wake(now);
    assert_eq!(next(&mut schedule, &Urgency::ALL, 1), None, "another blob");
    schedule.hurry(BLOB, now);
    schedule.wake(now);
    let hurried = next(&mut schedule, &Urgency::ALL, 1);
    assert_eq!(hurried, job(units(1, 2), Cause::Demand));
    assert_eq!(
        next(&mut schedule, &Urgency::ALL, 1),
        None,
        "their pauses are kept"
    );
}

const OTHER: ClientId = ClientId(1);

/// A disk with much to fetch delays another by one fetch, also where both want the same units.
#[test]
fn disks_take_turns() {
    let mut schedule = Test::default();
    for unit in 0..100 {
        schedule.want(
            CLIENT,
            BLOB,
            &[units(2 * unit, 2 * unit + 1)],
            Cause::Demand,
            Some("a"),
        );
    }
    schedule.want(OTHER, BLOB, &[units(180, 181)], Cause::Demand, Some("b"));
    schedule.want(OTHER, BLOB, &[units(301, 302)], Cause::Demand, Some("b"));
    let mut taken = Vec::new();
    for _ in 0..4 {
        taken.extend(next(&mut schedule, &Urgency::ALL, 1));
    }
    let taken: Vec<_> = taken.iter().map(|fetch| fetch.units.start()).collect();
    assert_eq!(taken, [180, 0, 301, 2]);
}

/// A disk whose fetches take long keeps no more than its share of the threads.
#[test]
fn a_disk_has_a_limited_number_of_demands_under_way() {
    let mut schedule = Test::default();
    for unit in 0..40 {
        schedule.want(
            CLIENT,
            BLOB,
            &[units(2 * unit, 2 * unit + 1)],
            Cause::Demand,
            Some("a"),
        );
    }
    let taken = std::iter::from_fn(|| next(&mut schedule, &Urgency::ALL, 1));
    assert_eq!(taken.count(), MAX_IN_FLIGHT);
    schedule.want(OTHER, BLOB, &[units(301, 302)], Cause::Demand, Some("b"));
    let fetch = next(&mut schedule, &Urgency::ALL, 1).unwrap();
    assert_eq!(fetch.client, OTHER);
    assert_eq!(next(&mut schedule, &Urgency::ALL, 1), None);
    schedule.ended(CLIENT, Cause::Demand);
    assert_eq!(
        next(&mut schedule, &Urgency::ALL, 1).unwrap().client,
        CLIENT
    );
}

/// What a disk that is gone wanted is not fetched, unless another waits for it.
#[test]
fn a_disk_that_is_gone_wants_nothing() {
    let mut schedule = Test::default();
    schedule.want(CLIENT, BLOB, &[units(0, 4)], Cause::Demand, Some("a"));
    schedule.want(OTHER, BLOB, &[units(2, 3)], Cause::Demand, Some("b"));
    schedule.want(CLIENT, BLOB, &[units(10, 20)], Cause::Replay, None);
    schedule.forget(CLIENT, |name| *name == "a");
    let fetch = next(&mut schedule, &Urgency::ALL, 4).unwrap();
    assert_eq!((fetch.client, fetch.units), (OTHER, units(2, 3)));
    assert_eq!(next(&mut schedule, &Urgency::ALL, 4), None);
}

/// Two disks want a unit, and its fetch fails: neither asks again before the pause is over.
#[test]
fn a_pause_is_kept_whoever_wants_the_unit() {
    let mut schedule = Test::default();
    let now = Instant::now();
    schedule.want(CLIENT, BLOB, &[units(0, 1)], Cause::Demand, Some("a"));
    schedule.want(OTHER, BLOB, &[units(0, 1)], Cause::Demand, Some("b"));
    let fetch = next(&mut schedule, &Urgency::ALL, 1).unwrap();
    schedule.failed(&fetch, &passing(), now + Duration::from_secs(1));
    assert_eq!(next(&mut schedule, &Urgency::ALL, 1), None);
    schedule.want(OTHER, BLOB, &[units(0, 1)], Cause::Demand, Some("c"));
    schedule.wake(now);
    assert_eq!(next(&mut schedule, &Urgency::ALL, 1), None);
    schedule.wake(now + Duration::from_secs(1));
    assert!(next(&mut schedule, &Urgency::ALL, 1).is_some());
    assert_eq!(next(&mut schedule, &Urgency::ALL, 1), None);
    assert_eq!(schedule.arrived(BLOB, units(0, 1)), ["a", "b", "c"]);
}
