//! Mount namespaces: what a program sees mounted, and nothing else does.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A program and its first arguments, which run the command that follows in a mount namespace of its
/// own, after a shell script.
pub fn with_own(setup: &str) -> Vec<OsString> {
    let namespace = match rustix::process::geteuid().is_root() {
        true => "-m",
        false => "-Urm",
    };
    let script = format!("set -e; {setup}; exec \"$@\"");
    let prefix = ["unshare", namespace, "sh", "-c", &script, "sh"];
    prefix.map(OsString::from).to_vec()
}

/// A namespace that outlives the programs in it, with all that its script mounted.
pub struct Namespace {
    holder: Child,
}

impl Namespace {
    /// Makes one, and runs a shell script in it.
    pub fn start(setup: &str) -> Namespace {
        let prefix = with_own(setup);
        let mut holder = Command::new(&prefix[0])
            .args(&prefix[1..])
            .args(["sh", "-c", "echo ready; exec sleep infinity"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a namespace");
        let output = holder.stdout.take().expect("its output");
        let mut lines = BufReader::new(output).lines().map_while(Result::ok);
        assert!(lines.any(|line| line == "ready"), "failed: {setup}");
        Namespace { holder }
    }

    /// A program and its first arguments, which run the command that follows in it.
    pub fn enter(&self) -> Vec<OsString> {
        let pid = self.holder.id().to_string();
        let mut prefix = vec!["nsenter", "--target", &pid, "--mount"];
        if !rustix::process::geteuid().is_root() {
            prefix.extend(["--user", "--preserve-credentials"]);
        }
        prefix.into_iter().map(OsString::from).collect()
    }

    /// The path of a file in it, for other programs.
    pub fn path(&self, path: &Path) -> PathBuf {
        let root = format!("/proc/{}/root", self.holder.id());
        Path::new(&root).join(path.strip_prefix("/").expect("an absolute path"))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
