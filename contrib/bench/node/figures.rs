//! Figures of a node, as a table and as charts.

use std::fs;
use std::time::Duration;

use rustix::process::Pid;

use crate::bars::Group;

/// What was measured with a number of disks.
pub struct Figures {
    pub disks: usize,
    /// Median and 99th percentile of a request that makes a disk.
    pub add: [Duration; 2],
    /// Time to make all disks at once.
    pub all_added: Duration,
    /// Median and 99th percentile of a request that removes a disk.
    pub remove: [Duration; 2],
    /// Time to remove all disks at once.
    pub all_removed: Duration,
    /// Private bytes of all disk processes.
    pub private: u64,
    /// Most descriptors of a disk process.
    pub descriptors: usize,
    /// Most threads of a disk process.
    pub threads: usize,
    /// Median time of a scrape.
    pub scrape: Duration,
    /// Bytes of a scrape.
    pub scrape_bytes: usize,
    /// From SIGKILL of the node until the next one has all disks.
    pub node_restart: Duration,
    /// From SIGKILL of all disk processes until all serve again.
    pub disks_restart: Duration,
}

/// The value below which a share of `times` lies.
pub fn quantile(times: &[Duration], share: f64) -> Duration {
    let mut times = times.to_vec();
    times.sort();
    let at = (times.len() as f64 * share).ceil() as usize;
    times[at.clamp(1, times.len()) - 1]
}

/// Private bytes of all processes; most descriptors and most threads of one.
pub fn memory_of(processes: &[Pid]) -> (u64, usize, usize) {
    let mut sums = (0, 0, 0);
    for process in processes {
        let rollup = fs::read_to_string(format!("/proc/{process}/smaps_rollup"));
        let private = rollup.unwrap_or_default();
        let private = private
            .lines()
            .filter(|line| line.starts_with("Private_"))
            .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        let count = |name| {
            let found = fs::read_dir(format!("/proc/{process}/{name}"));
            found.map_or(0, Iterator::count)
        };
        sums.0 += private.sum::<u64>() * 1024;
        sums.1 = sums.1.max(count("fd"));
        sums.2 = sums.2.max(count("task"));
    }
    sums
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The figures in Markdown.
pub fn table(results: &[Figures]) -> String {
    type Row = (&'static str, fn(&Figures) -> String);
    let rows: [Row; 9] = [
        ("add one, p50 / p99", |all| {
            format!("{:.1} / {:.1} ms", ms(all.add[0]), ms(all.add[1]))
        }),
        ("add all at once", |all| {
            format!("{:.0} ms", ms(all.all_added))
        }),
        ("remove one, p50 / p99", |all| {
            format!("{:.1} / {:.1} ms", ms(all.remove[0]), ms(all.remove[1]))
        }),
        ("remove all at once", |all| {
            format!("{:.0} ms", ms(all.all_removed))
        }),
        ("private memory of a disk process, idle", |all| {
            format!("{:.0} KiB", all.private as f64 / all.disks as f64 / 1024.0)
        }),
        ("descriptors, threads of a disk process", |all| {
            format!("{}, {}", all.descriptors, all.threads)
        }),
        ("scrape, p50", |all| {
            format!("{:.1} ms, {} KiB", ms(all.scrape), all.scrape_bytes / 1024)
        }),
        ("node killed, next node has all disks", |all| {
            format!("{:.0} ms", ms(all.node_restart))
        }),
        ("all disks killed, all serve again", |all| {
            format!("{:.0} ms", ms(all.disks_restart))
        }),
    ];
    let mut text = "| disks |".to_owned();
    for all in results {
        text += &format!(" {} |", all.disks);
    }
    text += &format!("\n|---|{}\n", "---|".repeat(results.len()));
    for (name, cell) in rows {
        text += &format!("| {name} |");
        for all in results {
            text += &format!(" {} |", cell(all));
        }
        text.push('\n');
    }
    text
}

/// Label of a bar.
fn label(disks: usize) -> String {
    match disks {
        1 => "1 disk".to_owned(),
        _ => format!("{disks} disks"),
    }
}

/// The figures as charts.
pub fn charts(results: &[Figures]) -> Vec<Group> {
    let chart = |title, figure: fn(&Figures) -> f64| {
        let bars = results.iter().map(|all| (label(all.disks), figure(all)));
        Group::new(title, bars.collect())
    };
    vec![
        chart("add one disk, median (ms)", |all| ms(all.add[0])),
        chart("add one disk, 99th percentile (ms)", |all| ms(all.add[1])),
        chart("add all disks at once (ms)", |all| ms(all.all_added)),
        chart("remove all disks at once (ms)", |all| ms(all.all_removed)),
        chart("private memory of a disk process (KiB)", |all| {
            all.private as f64 / all.disks as f64 / 1024.0
        }),
        chart("scrape of the metrics, median (ms)", |all| ms(all.scrape)),
        chart("node killed until the next has all disks (ms)", |all| {
            ms(all.node_restart)
        }),
        chart("all disks killed until all serve again (ms)", |all| {
            ms(all.disks_restart)
        }),
    ]
}
