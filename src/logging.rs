//! Log lines of all programs: one record a line on standard error, as text or as JSON.
//!
//! ```text
//! [2026-11-28T20:35:07Z INFO  ovbd_vhost::daemon] serving 2 layers ...
//! {"time":"2026-11-28T20:35:07Z","level":"info","target":"ovbd_vhost::daemon","message":"serving 2 layers ..."}
//! ```
//! `RUST_LOG` chooses the levels. The format is an option of the programs; the processes that they start
//! take it from [`VARIABLE`], since they log before they have read what their parent asks of them.

use std::env;
use std::error::Error;
use std::io::{self, Write};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::ValueEnum;
use env_logger::fmt::Formatter;
use log::Record;
use serde::{Deserialize, Serialize};

use crate::reason::reason;

/// Environment variable that names the format.
pub const VARIABLE: &str = "OVBD_LOG_FORMAT";

/// Format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    #[default]
    Text,
    /// For programs: an object a line, with time, level, target and message
    Json,
}

/// Whether lines are JSON. One for the process, as the logger is.
static JSON: AtomicBool = AtomicBool::new(false);

/// A line in JSON.
#[derive(Serialize)]
struct Line<'a> {
    time: String,
    level: &'a str,
    target: &'a str,
    message: String,
}

/// Starts the log, in the format of [`VARIABLE`]. `levels` is used where `RUST_LOG` is not set.
pub fn start(levels: &str) {
    let format = env::var(VARIABLE).ok();
    let format = format.and_then(|name| LogFormat::from_str(&name, false).ok());
    set_format(format.unwrap_or_default());
    let levels = env_logger::Env::default().default_filter_or(levels);
    env_logger::Builder::from_env(levels).format(write).init();
}

/// Changes the format of all lines from now on.
pub fn set_format(format: LogFormat) {
    JSON.store(format == LogFormat::Json, Ordering::Relaxed);
}

/// Lets a program that is started log in the same format.
pub fn pass_format(command: &mut Command) {
    let format = match JSON.load(Ordering::Relaxed) {
        true => "json",
        false => "text",
    };
    command.env(VARIABLE, format);
}

/// Reports the error that ends `program`, as one line.
pub fn report(program: &str, error: &dyn Error) {
    match JSON.load(Ordering::Relaxed) {
        true => log::error!(target: program, "{}", reason(error)),
        // Standard error is the last place to report to.
        false => drop(writeln!(io::stderr(), "{program}: {}", reason(error))),
    }
}

/// The message of a line that [`start`] made the log write; the line itself if it is another.
pub fn message(line: &str) -> String {
    #[derive(Deserialize)]
    struct Read {
        message: String,
    }
    let read = serde_json::from_str(line).map(|Read { message }| message);
    read.unwrap_or_else(|_| line.to_owned())
}

fn write(buffer: &mut Formatter, record: &Record<'_>) -> io::Result<()> {
    let (time, target) = (buffer.timestamp(), record.target());
    if !JSON.load(Ordering::Relaxed) {
        let (level, message) = (record.level(), record.args());
        return writeln!(buffer, "[{time} {level:<5} {target}] {message}");
    }
    let line = Line {
        time: time.to_string(),
        level: &record.level().as_str().to_ascii_lowercase(),
        target,
        message: record.args().to_string(),
    };
    serde_json::to_writer(&mut *buffer, &line)?;
    writeln!(buffer)
}
