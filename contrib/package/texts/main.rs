//! Writes the texts of a package: manual pages, completions, the SBOM and the licences.
//!
//! `contrib/package/run` calls this program. It includes the arguments of the programs from their
//! sources, so that the programs themselves carry none of this.

mod completions;
mod dependencies;
mod licences;
mod man;
mod sbom;

#[allow(dead_code)]
#[path = "../../../src/bin/ovbd/main.rs"]
mod ovbd;
#[allow(dead_code)]
#[path = "../../../src/bin/ovbd-node.rs"]
mod ovbd_node;
#[allow(dead_code)]
#[path = "../../../src/bin/ovbd-vhost.rs"]
mod ovbd_vhost_daemon;

use std::error::Error;
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory, Parser};
use dependencies::Dependencies;

/// Write the texts of a package.
#[derive(Parser)]
enum Task {
    /// Write the manual pages to a directory
    Man {
        /// Version on the pages
        #[arg(long)]
        package_version: String,
        /// Date on the pages, as YYYY-MM-DD
        #[arg(long)]
        date: String,
        /// Directory to write to
        dir: PathBuf,
    },
    /// Write the completions of bash, zsh and fish below a directory, as in /usr/share
    Completions {
        /// Directory to write to
        dir: PathBuf,
    },
    /// Write the software bill of materials, in CycloneDX
    Sbom {
        /// Version of the programs
        #[arg(long)]
        package_version: String,
        /// Time of the build, as YYYY-MM-DDTHH:MM:SSZ
        #[arg(long)]
        time: String,
        /// File to write
        file: PathBuf,
    },
    /// Write the licences of everything that the programs are built from
    Licences {
        /// File to write
        file: PathBuf,
    },
}

/// A program, as its users see it.
struct Program {
    command: Command,
    /// Section of its manual page.
    section: &'static str,
}

fn programs() -> Vec<Program> {
    vec![
        Program {
            command: ovbd::args::Cli::command(),
            section: "1",
        },
        Program {
            command: ovbd_vhost_daemon::Args::command(),
            section: "8",
        },
        Program {
            command: ovbd_node::Args::command(),
            section: "8",
        },
    ]
}

/// The directory of this project.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn main() -> Result<(), Box<dyn Error>> {
    match Task::parse() {
        Task::Man {
            package_version,
            date,
            dir,
        } => man::write(programs(), &package_version, &date, &dir),
        Task::Completions { dir } => completions::write(programs(), &dir),
        Task::Sbom {
            package_version,
            time,
            file,
        } => sbom::write(&Dependencies::read()?, &package_version, &time, &file),
        Task::Licences { file } => licences::write(&Dependencies::read()?, &file),
    }
}
