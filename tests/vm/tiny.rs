//! The tiny guest (`tinyguest/`): a driver of our own that boots in no time and sends bad requests.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use crate::machine::{Board, Hardware, Machine};
use crate::process::{command, output};

static KERNEL: LazyLock<PathBuf> = LazyLock::new(|| {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vm/tinyguest");
    let kernel = Path::new(env!("CARGO_TARGET_TMPDIR")).join("tinyguest.elf");
    output(command(source.join("build")).arg(&kernel));
    kernel
});

/// MiB of memory that the machine shares with the daemon, and of memory above it that it does not.
pub const SHARED: u32 = 256;
const PRIVATE: u32 = 64;

/// What one run of the tiny guest printed, ended by its power-off.
pub struct Report(String);

/// Boots it with `options` (the list is at the top of `tinyguest/tg.c`) and waits for its end.
pub fn run(dir: &Path, socket: &Path, options: &str) -> Report {
    report(start(dir, socket, Board::Pc, options, &[]))
}

/// Starts it on a board, with more options for QEMU.
pub fn start(dir: &Path, socket: &Path, board: Board, options: &str, more: &[&str]) -> Machine {
    let kernel = KERNEL.to_str().expect("path");
    Machine::start(
        dir,
        socket,
        &Hardware {
            board,
            processors: 1,
            memory: SHARED * 1024,
            private: if board == Board::Pc {
                PRIVATE * 1024
            } else {
                0
            },
            boot: [&["-kernel", kernel, "-append", options], more].concat(),
            console: false,
        },
    )
}

/// Waits for its end.
pub fn report(mut machine: Machine) -> Report {
    let mut text = String::new();
    // A microvm has nothing to switch it off with.
    while !text.contains("TG end")
        && let Some(line) = machine.line()
    {
        text += &line;
        text += "\n";
    }
    assert!(
        text.contains("TG end disks=1"),
        "the guest did not finish{}",
        machine.report()
    );
    Report(text)
}

impl Report {
    /// The value of `key=` on the line that starts with `TG topic`.
    pub fn value(&self, topic: &str, key: &str) -> &str {
        let prefix = format!("TG {topic} ");
        self.0
            .lines()
            .filter_map(|line| line.strip_prefix(&prefix))
            .flat_map(|line| line.split(' '))
            .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
            .unwrap_or_else(|| panic!("no {key} of {topic} in:\n{}", self.0))
    }
}
