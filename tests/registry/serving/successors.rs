//! Kills of the processes that keep a fetcher running: each has a successor.

use common::fetch_processes::{Role, of_cache};
use common::registry_server::until;
use common::remote::{Layers, Place};
use rustix::process::{Signal, kill_process};
use serde_json::json;

use super::{Reader, UNIT};

/// Processes that are killed one right after the other. The keeper and its standby are never killed together: the
/// standby has what it needs once it runs.
const VICTIMS: [&[Role]; 7] = [
    &[Role::Keeper, Role::Fetcher],
    &[Role::Fetcher, Role::Keeper],
    &[Role::Keeper],
    &[Role::Fetcher],
    &[Role::Standby],
    &[Role::Standby, Role::Fetcher],
    &[Role::Keeper, Role::Fetcher],
];

#[test]
fn a_cold_read_is_answered_whatever_was_killed() {
    let layers = Layers::new(16);
    let place = Place::default();
    let server = layers.registry();
    place.config("http", &server.host(), &layers.lowers(), json!({}));
    let daemon = place.serve(&[]);
    let cache = place.path("cache");
    let mut reader = Reader::connect(&daemon);
    for (round, victims) in VICTIMS.into_iter().enumerate() {
        let mut found = Vec::new();
        until("one process of each kind runs", || {
            found = of_cache(&cache);
            let roles: Vec<_> = found.iter().map(|(role, _)| *role).collect();
            roles == [Role::Keeper, Role::Standby, Role::Fetcher]
        });
        for victim in victims {
            for (_, pid) in found.iter().filter(|(role, _)| role == victim) {
                kill_process(*pid, Signal::KILL).expect("a kill");
            }
        }
        reader.ask((0..4).map(|read| (round * 4 + read) * 37 % 256 * UNIT));
        reader.check(&layers.content);
    }
    reader.check_all(&layers.content);
    drop((reader, daemon));
    until("all processes end with the disk", || {
        of_cache(&cache).is_empty()
    });
}
