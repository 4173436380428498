//! The commands about the snapshots of a disk.

use std::error::Error;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use ovbd_vhost::tool::ctl::{Ask, ask};
use ovbd_vhost::tool::snapshots::Listing;
use ovbd_vhost::tool::{progress, snapshots};
use ovbd_vhost::writable::Paths;

use super::options::{JsonArgs, ThreadArgs, UpperArgs};
use super::values::pair;

/// List and delete snapshots of a disk, and roll the disk back.
///
/// `ovbd ctl SOCKET snapshot NAME` takes a snapshot of a running disk.
#[derive(Subcommand)]
pub enum SnapshotCommand {
    List(ListArgs),
    Delete(DeleteArgs),
    Rollback(RollbackArgs),
}

/// List the snapshots of a disk, in use or not, oldest first.
#[derive(Args)]
pub struct ListArgs {
    #[command(flatten)]
    disk: DiskArgs,
    #[command(flatten)]
    json: JsonArgs,
}

/// The disk, by its files or by its daemon.
#[derive(Args)]
#[group(required = true, multiple = false)]
struct DiskArgs {
    /// First pair of files of the writable layer, as data=FILE,index=FILE
    #[arg(long, value_name = "FILES", value_parser = pair())]
    upper: Option<Paths>,
    /// Directory of the writable layer, as the daemon's --upper-auto
    #[arg(long, value_name = "DIR")]
    upper_auto: Option<PathBuf>,
    /// Control socket of the daemon that serves the disk
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
}

/// Delete a snapshot of a disk that is not in use.
///
/// The disk and its other snapshots keep their content: the layer of the snapshot is merged with the one
/// above it. No other disk may use these layers. Crash-safe: an interrupted run leaves the snapshot or
/// deletes it.
#[derive(Args)]
pub struct DeleteArgs {
    /// Name of the snapshot
    name: String,
    #[command(flatten)]
    upper: UpperArgs,
    #[command(flatten)]
    threads: ThreadArgs,
    #[command(flatten)]
    json: JsonArgs,
}

/// Make a disk that is not in use what it was at a snapshot.
///
/// Everything that was written since is lost. Crash-safe: an interrupted run leaves the disk unchanged or
/// rolled back.
#[derive(Args)]
pub struct RollbackArgs {
    /// Name of the snapshot
    name: String,
    /// Delete later snapshots; without this option, a disk with later snapshots is refused
    #[arg(long)]
    delete_newer: bool,
    #[command(flatten)]
    upper: UpperArgs,
    #[command(flatten)]
    json: JsonArgs,
}

impl SnapshotCommand {
    /// Runs the command; returns its output.
    pub fn run(self) -> Result<String, Box<dyn Error>> {
        match self {
            Self::List(args) => {
                let DiskArgs {
                    upper,
                    upper_auto,
                    control,
                } = args.disk;
                let upper = upper.or(upper_auto.as_deref().map(Paths::in_directory));
                let listing = match (upper, control) {
                    (Some(upper), _) => snapshots::list(&upper)?,
                    (None, control) => {
                        let answer = ask(&control.unwrap_or_default(), &Ask::Snapshots)?;
                        Listing::from_answer(&answer)
                    }
                };
                Ok(args.json.text(&listing)?)
            }
            Self::Delete(args) => {
                let (threads, bar) = (args.threads.count(), progress::bar("deleting"));
                let changed = snapshots::delete(&args.upper.paths(), &args.name, threads, &bar)?;
                Ok(args.json.text(&changed)?)
            }
            Self::Rollback(args) => {
                let upper = args.upper.paths();
                let changed = snapshots::roll_back(&upper, &args.name, args.delete_newer)?;
                Ok(args.json.text(&changed)?)
            }
        }
    }
}
