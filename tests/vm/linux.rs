//! Debian's cloud kernel with a busybox shell (`init`), driven order by order.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use crate::machine::{Board, Hardware, Machine};
use crate::process::{command, output};

/// Directory with `vmlinuz` and `initrd.gz`, built once per run.
static IMAGES: LazyLock<PathBuf> = LazyLock::new(|| {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("linux-guest");
    fs::create_dir_all(&directory).expect("directory of the guest");
    output(
        command(root.join("contrib/guest/build"))
            .arg(root.join("tests/vm/init"))
            .arg(&directory),
    );
    directory
});

/// KiB of memory: no multiple of 256 KiB.
///
/// Before version 9.0, QEMU's emulation misses writes of the guest's processors while it migrates memory of
/// such a size (fixed by its commit 03bfc2188f06): after a migration the guest has old pages, and crashes. Of
/// other sizes each page is examined by itself, and none is missed.
const MEMORY: u32 = 512 * 1024 - 128;

/// A booted Linux whose `/dev/vda` is the daemon's.
pub struct Linux(Machine);

impl Linux {
    /// Boots with two processors, thus two queues; returns when the disk is there.
    pub fn boot(dir: &Path, socket: &Path) -> Self {
        Self::started(Self::machine(dir, socket, &[]))
    }

    /// Starts the machine, with more options for QEMU.
    pub fn machine(dir: &Path, socket: &Path, more: &[&str]) -> Machine {
        let image = |name: &str| IMAGES.join(name).to_str().expect("path").to_owned();
        let (kernel, initrd) = (image("vmlinuz"), image("initrd.gz"));
        let boot = [
            "-kernel",
            &kernel,
            "-initrd",
            &initrd,
            "-append",
            // The kernel counts ticks of its timer at the start, and gives up where a busy host delays them.
            "console=ttyS0 panic=-1 quiet no_timer_check",
        ];
        Machine::start(
            dir,
            socket,
            &Hardware {
                board: Board::Pc,
                processors: 2,
                memory: MEMORY,
                private: 0,
                boot: [&boot[..], more].concat(),
                console: true,
            },
        )
    }

    /// The Linux that `machine` boots, once its disk is there.
    pub fn started(mut machine: Machine) -> Self {
        loop {
            let Some(line) = machine.line() else {
                panic!("the machine is off{}", machine.report());
            };
            // Firmware may have written to the port before, without an end of line.
            if line.ends_with("=> 0") {
                return Self(machine);
            }
        }
    }

    /// A Linux that runs on `machine` by now, where it moved.
    pub fn moved(machine: Machine) -> Self {
        Self(machine)
    }

    /// Its machine.
    pub fn hardware(&self) -> &Machine {
        &self.0
    }

    /// Runs a line of shell; returns what it prints. Any status but 0 fails the test.
    pub fn run(&mut self, order: &str) -> Vec<String> {
        self.0.send(order);
        self.answer()
    }

    /// Switches the machine off and waits until it is.
    pub fn power_off(mut self) {
        self.0.send("poweroff -f");
        while self.0.line().is_some() {}
    }

    fn answer(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        loop {
            let Some(line) = self.0.line() else {
                panic!("the machine is off{}", self.0.report());
            };
            match line.strip_prefix("=> ") {
                Some("0") => return lines,
                Some(status) => panic!("the guest's shell: status {status}{}", self.0.report()),
                None => lines.push(line),
            }
        }
    }
}
