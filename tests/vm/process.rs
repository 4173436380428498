//! Programs of this machine, started so that they end with the test that started them.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::{env, fs};

/// Where `name` is installed; a missing tool fails the test and says what to do.
fn find(name: &str) -> PathBuf {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
        .unwrap_or_else(|| panic!("{name} is not installed: run contrib/install-packages"))
}

/// A command that the kernel kills when the thread of this test is gone, however it went.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(find("setpriv"));
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// [`command`] for a tool of the system.
pub fn tool(name: &str) -> Command {
    command(find(name))
}

/// Runs `command` to its end and returns what it wrote to stdout; failure fails the test.
pub fn output(command: &mut Command) -> String {
    let output = command.output().expect("program starts");
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("text")
}

/// A child that is killed and reaped when dropped.
#[derive(Debug)]
pub struct Process(pub Child);

impl Process {
    /// `SIGKILL`, then wait: nothing of it runs any more on return.
    pub fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A file's text with anything that is not text replaced, or nothing where there is no file.
pub fn text_of(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}
