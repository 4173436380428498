//! A QEMU machine without hardware virtualization, with one vhost-user-blk disk.
//!
//! The guest's lines on one serial port arrive through a channel; the kernel's own messages, if it
//! has a second port, land in a file that is shown when something fails.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::process::{Process, text_of, tool};

/// How long a guest may stay silent before the test gives up on it.
const SILENCE_LIMIT: Duration = Duration::from_secs(90);

/// How a machine's disk is attached.
#[derive(Clone, Copy, PartialEq)]
pub enum Board {
    /// A PC, where the disk is a PCI device.
    Pc,
    /// A microvm, where it is a virtio-mmio device: the driver chooses the length of its queues.
    Microvm,
}

/// What distinguishes one guest's machine from another's.
pub struct Hardware<'a> {
    /// How the disk is attached.
    pub board: Board,
    /// Processors, and queues of the disk.
    pub processors: u32,
    /// KiB of memory, shared with the daemon.
    pub memory: u32,
    /// KiB of memory above it that are not shared.
    pub private: u32,
    /// Kernel, initramfs and command line, and more options.
    pub boot: Vec<&'a str>,
    /// Whether kernel messages have the first serial port to themselves.
    pub console: bool,
}

/// A running machine; killed when dropped.
pub struct Machine {
    process: Process,
    lines: Receiver<String>,
    seen: String,
    console: PathBuf,
    errors: PathBuf,
    monitor: PathBuf,
}

impl Machine {
    /// Starts a machine whose disk is behind `socket`; files go to `dir`.
    pub fn start(dir: &Path, socket: &Path, hardware: &Hardware) -> Self {
        let Hardware {
            processors,
            memory,
            private,
            ..
        } = hardware;
        let console = dir.join("console.log");
        let errors = dir.join("qemu.log");
        let monitor = dir.join("monitor");
        let (board, device) = match hardware.board {
            Board::Pc => ("q35", "vhost-user-blk-pci"),
            // Without ACPI the kernel's command line names the devices.
            Board::Microvm => ("microvm,acpi=off", "vhost-user-blk"),
        };
        let mut qemu = tool("qemu-system-x86_64");
        qemu.args([
            "-M",
            board,
            "-global",
            "virtio-mmio.force-legacy=false",
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-nodefaults",
            "-no-reboot",
        ])
        .args(["-display", "none", "-smp", &processors.to_string()])
        .args([
            "-m",
            &format!("{}K", memory + private),
            "-numa",
            "node,memdev=memory",
            "-object",
        ])
        .arg(format!(
            "memory-backend-memfd,id=memory,size={memory}K,share=on"
        ))
        .arg("-chardev")
        .arg(format!(
            "socket,id=disk,path={},reconnect=1",
            socket.display()
        ))
        .arg("-device")
        .arg(format!("{device},chardev=disk,num-queues={processors}"))
        .arg("-monitor")
        .arg(format!("unix:{},server=on,wait=off", monitor.display()))
        .args(&hardware.boot);
        if *private > 0 {
            qemu.args(["-numa", "node,memdev=private", "-object"])
                .arg(format!("memory-backend-ram,id=private,size={private}K"));
        }
        if hardware.console {
            qemu.arg("-serial")
                .arg(format!("file:{}", console.display()));
        }
        qemu.args(["-serial", "stdio"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&errors).expect("log file"));
        let mut process = Process(qemu.spawn().expect("QEMU starts"));

        let output = process.0.stdout.take().expect("stdout of QEMU");
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self {
            process,
            lines,
            seen: String::new(),
            console,
            errors,
            monitor,
        }
    }

    /// Gives QEMU's monitor a command; returns its answer.
    pub fn monitor(&self, command: &str) -> String {
        const PROMPT: &str = "(qemu) ";
        let start = Instant::now();
        let mut stream = loop {
            match UnixStream::connect(&self.monitor) {
                Ok(stream) => break stream,
                Err(error) => assert!(start.elapsed() < SILENCE_LIMIT, "no monitor: {error}"),
            }
            thread::sleep(Duration::from_millis(10));
        };
        stream
            .set_read_timeout(Some(SILENCE_LIMIT))
            .expect("socket");
        let mut text = String::new();
        let mut read_to_prompt = |stream: &mut UnixStream| {
            let mut buffer = [0; 4096];
            while !text.ends_with(PROMPT) {
                let count = stream.read(&mut buffer).expect("the monitor answers");
                assert!(count > 0, "the monitor is gone: {text}");
                text += &String::from_utf8_lossy(&buffer[..count]);
            }
            std::mem::take(&mut text)
        };
        read_to_prompt(&mut stream);
        writeln!(stream, "{command}").expect("monitor");
        read_to_prompt(&mut stream)
    }

    /// Waits until the monitor's answer to `command` satisfies `condition`.
    pub fn wait_until(&self, command: &str, condition: impl Fn(&str) -> bool) {
        let start = Instant::now();
        loop {
            let answer = self.monitor(command);
            if condition(&answer) {
                return;
            }
            assert!(
                start.elapsed() < 2 * SILENCE_LIMIT,
                "{command}: {answer}{}",
                self.report()
            );
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Sends a line to the guest.
    pub fn send(&mut self, line: &str) {
        let input = self.process.0.stdin.as_mut().expect("stdin of QEMU");
        writeln!(input, "{line}").expect("guest reads its serial port");
    }

    /// The guest's next line, or `None` once the machine is off. A silent guest fails the test.
    pub fn line(&mut self) -> Option<String> {
        match self.lines.recv_timeout(SILENCE_LIMIT) {
            Ok(line) => {
                self.seen += &line;
                self.seen += "\n";
                Some(line)
            }
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => {
                panic!(
                    "the guest has been silent for {SILENCE_LIMIT:?}{}",
                    self.report()
                )
            }
        }
    }

    /// What there is to know about the machine when a test fails.
    pub fn report(&self) -> String {
        format!(
            "\n--- guest ---\n{}\n--- kernel ---\n{}\n--- QEMU ---\n{}",
            self.seen,
            text_of(&self.console),
            text_of(&self.errors)
        )
    }
}
