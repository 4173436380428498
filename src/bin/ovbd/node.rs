//! The commands about a node and its disks.

use std::error::Error;
use std::io::{self, IsTerminal, Write};
use std::path::{PathBuf, absolute};
use std::thread;
use std::time::Duration;

use clap::{Args, Subcommand};
use ovbd_vhost::registry::reference::Reference;
use ovbd_vhost::tool;
use ovbd_vhost::tool::node::client::{Content, DEFAULT_CONTROL, LimitChange, Node, Properties};
use ovbd_vhost::tool::node::{events, list, top};
use ovbd_vhost::units::parse_size;
use ovbd_vhost::vhost::takeover::Takeover;
use serde_json::{Value, json};

/// Clears a terminal and moves to its first line.
const CLEAR: &str = "\x1b[2J\x1b[H";

/// Manage the disks of a running ovbd-node.
#[derive(Args)]
pub struct NodeArgs {
    /// Control socket of the node: the PATH of its --control
    #[arg(long, value_name = "PATH", default_value = DEFAULT_CONTROL, global = true)]
    control: PathBuf,
    /// Write JSON in place of text
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: NodeCommand,
}

#[derive(Subcommand)]
enum NodeCommand {
    /// List the disks
    List {
        /// List only disks with this label
        #[arg(long, value_name = "KEY=VALUE", value_parser = label)]
        label: Option<(String, String)>,
    },
    Add(Box<AddArgs>),
    /// Remove disks; the files of their writable layers are kept
    Rm {
        #[arg(value_name = "DISK", required = true)]
        ids: Vec<String>,
        /// Remove a disk even if a front-end is connected or its process does not answer
        #[arg(long)]
        force: bool,
    },
    Fork(ForkArgs),
    /// List the snapshots of a disk, oldest first
    Snapshots {
        #[arg(value_name = "DISK")]
        id: String,
    },
    /// Freeze the content of a disk as a layer; the guest continues to write above it
    Snapshot {
        #[arg(value_name = "DISK")]
        id: String,
        /// Name of the snapshot; a second request with the same name returns the same snapshot
        name: String,
        /// Wait until the layer is sealed
        #[arg(long)]
        wait: bool,
    },
    Limits(LimitArgs),
    /// Print what happens to disks, one line per event
    Events {
        /// Print the events after this number
        #[arg(long, value_name = "N", default_value_t = 0)]
        after: u64,
        /// Wait for further events
        #[arg(long)]
        follow: bool,
    },
    /// Print the rates of all disks again and again, the busiest disk first
    Top {
        /// Seconds between two tables
        #[arg(long, value_name = "N", default_value_t = 2,
              value_parser = clap::value_parser!(u64).range(1..=3600))]
        interval: u64,
        /// End after N tables [default: do not end]
        #[arg(long, value_name = "N")]
        count: Option<u64>,
    },
    /// Replace the processes of all disks, one after the other, after an upgrade of ovbd-vhost
    Reload,
    /// Replace the processes of disks, one after the other; guests see a pause. A failed disk is started
    /// again
    Restart {
        #[arg(value_name = "DISK", required = true)]
        ids: Vec<String>,
    },
}

/// Make a disk.
///
/// The same command may be repeated: if the same disk exists, it is printed.
#[derive(Args)]
struct AddArgs {
    /// Name of the disk: letters, digits, `.`, `_` and `-`
    #[arg(value_name = "DISK")]
    id: String,
    #[command(flatten)]
    content: ContentArgs,
    #[command(flatten)]
    properties: PropertyArgs,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct ContentArgs {
    /// Layers, bottom first, separated by commas; repeatable
    #[arg(long, value_name = "FILE", value_delimiter = ',')]
    layers: Vec<PathBuf>,
    /// OverlayBD image config (config.v1.json)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// OverlayBD image in a registry, as REGISTRY/REPOSITORY[:TAG][@DIGEST]
    #[arg(long, value_name = "REF")]
    image: Option<Reference>,
}

/// Make a disk from the present content of another disk, which may be in use.
///
/// Takes a snapshot of the other disk if it has none of that name.
#[derive(Args)]
struct ForkArgs {
    /// Disk to fork
    #[arg(value_name = "DISK")]
    from: String,
    /// Name of the new disk
    #[arg(value_name = "NEW")]
    id: String,
    /// Name of the snapshot [default: fork-NEW]
    #[arg(long, value_name = "NAME")]
    snapshot: Option<String>,
    #[command(flatten)]
    properties: PropertyArgs,
}

#[derive(Args)]
struct PropertyArgs {
    /// Directory of the writable layer; created if missing [default: none, the disk is read-only]
    #[arg(long, value_name = "DIR")]
    upper: Option<PathBuf>,
    /// Limit of the data in the writable layer, in bytes, or with K, M, G or T [default: none]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, requires = "upper")]
    upper_limit: Option<u64>,
    /// Unix socket of the disk [default: DISK.sock in the node's run directory]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Serial number of the disk [default: derived from the image]
    #[arg(long, value_name = "TEXT")]
    serial: Option<String>,
    /// Number of virtqueues [default: 256]
    #[arg(long, value_name = "N")]
    num_queues: Option<u16>,
    /// When a front-end takes the disk over from another that is connected [default: peer]
    #[arg(long, value_name = "POLICY", value_enum)]
    takeover: Option<Takeover>,
    /// Label of the disk; repeatable
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
}

/// Show or set the rate limits of a disk.
#[derive(Args)]
struct LimitArgs {
    #[arg(value_name = "DISK")]
    id: String,
    /// Most operations per second; `none` removes the limit
    #[arg(long, value_name = "N", value_parser = rate)]
    ops: Option<Rate>,
    /// Operations beside those, once
    #[arg(long, value_name = "N", requires = "ops")]
    ops_burst: Option<u64>,
    /// Most bytes per second, also with K, M, G or T; `none` removes the limit
    #[arg(long, value_name = "SIZE", value_parser = rate)]
    bandwidth: Option<Rate>,
    /// Bytes beside those, once
    #[arg(long, value_name = "SIZE", value_parser = parse_size, requires = "bandwidth")]
    bandwidth_burst: Option<u64>,
}

#[derive(Clone, Copy)]
enum Rate {
    None,
    PerSecond(u64),
}

impl Rate {
    fn change(self, burst: Option<u64>) -> LimitChange {
        match self {
            Self::None => LimitChange::Remove,
            Self::PerSecond(rate) => LimitChange::Set { rate, burst },
        }
    }
}

fn rate(text: &str) -> Result<Rate, String> {
    match text {
        "none" => Ok(Rate::None),
        _ => match parse_size(text) {
            Ok(0) => Err("expected at least 1; `none` removes the limit".to_owned()),
            Ok(rate) => Ok(Rate::PerSecond(rate)),
            Err(error) => Err(error.to_string()),
        },
    }
}

fn label(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(key, _)| !key.is_empty());
    let (key, value) = pair.ok_or("expected KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// Returns the absolute path: the node has another working directory. Requests are JSON, and thus UTF-8.
fn full(path: PathBuf) -> Result<String, Box<dyn Error>> {
    let path = absolute(path)?.into_os_string().into_string();
    Ok(path.map_err(|path| format!("{}: expected a UTF-8 path", path.display()))?)
}

impl ContentArgs {
    fn content(self) -> Result<Content, Box<dyn Error>> {
        Ok(match (self.config, self.image) {
            (Some(config), _) => Content::Config(full(config)?),
            (_, Some(image)) => Content::Image(image.to_string()),
            (None, None) => {
                let layers = self.layers.into_iter().map(full);
                Content::Layers(layers.collect::<Result<_, _>>()?)
            }
        })
    }
}

impl PropertyArgs {
    fn properties(self) -> Result<Properties, Box<dyn Error>> {
        Ok(Properties {
            upper: self.upper.map(full).transpose()?,
            upper_limit: self.upper_limit,
            socket: self.socket.map(full).transpose()?,
            serial: self.serial,
            num_queues: self.num_queues,
            takeover: self.takeover.map(Takeover::word),
            labels: self.labels,
        })
    }
}

impl NodeArgs {
    /// Runs the command, and prints its results.
    pub fn run(self) -> Result<(), Box<dyn Error>> {
        let node = Node::at(&self.control);
        let out = Output { json: self.json };
        match self.command {
            NodeCommand::List { label } => {
                let label = label.map(|(key, value)| format!("{key}={value}"));
                let disks = node.disks(label.as_deref())?;
                out.print(|| list::disks(&disks), || json!({ "disks": disks }))
            }
            NodeCommand::Add(args) => {
                let (content, more) = (args.content.content()?, args.properties.properties()?);
                out.disk(&node.add(&args.id, &content, &more)?)
            }
            NodeCommand::Rm { ids, force } => ids.iter().try_for_each(|id| {
                node.remove(id, force)?;
                out.print(|| format!("{id}: removed\n"), || json!({ "removed": id }))
            }),
            NodeCommand::Fork(args) => {
                let name = args.snapshot.unwrap_or_else(|| format!("fork-{}", args.id));
                let content = Content::Snapshot {
                    disk: args.from,
                    name,
                };
                out.disk(&node.add(&args.id, &content, &args.properties.properties()?)?)
            }
            NodeCommand::Snapshots { id } => {
                let snapshots = node.snapshots(&id)?;
                out.print(|| list::snapshots(&snapshots), || json!(snapshots))
            }
            NodeCommand::Snapshot { id, name, wait } => {
                let snapshot = node.snapshot(&id, &name, wait)?;
                out.print(|| snapshot_line(&id, &snapshot), || snapshot.clone())
            }
            NodeCommand::Limits(args) => {
                let ops = args.ops.map(|ops| ops.change(args.ops_burst));
                let bandwidth = args.bandwidth.map(|rate| rate.change(args.bandwidth_burst));
                let disk = node.limit(&args.id, ops, bandwidth)?;
                out.print(|| list::limits(&disk), || disk["limits"].clone())
            }
            NodeCommand::Events { after, follow } => out.events(&node, after, follow),
            NodeCommand::Top { interval, count } => {
                out.top(&node, Duration::from_secs(interval), count)
            }
            NodeCommand::Reload => {
                let begun = node.reload()?;
                let count = begun["disks"].as_u64().unwrap_or_default();
                out.print(
                    || format!("{count} disks are being replaced\n"),
                    || begun.clone(),
                )
            }
            NodeCommand::Restart { ids } => {
                ids.iter().try_for_each(|id| out.disk(&node.restart(id)?))
            }
        }
    }
}

fn snapshot_line(id: &str, snapshot: &Value) -> String {
    let layers = snapshot["layers"].as_array().map_or(0, Vec::len);
    let name = snapshot["name"].as_str().unwrap_or_default();
    let sealed = match snapshot["sealed"].as_bool() {
        Some(true) => "sealed",
        _ => "not sealed yet",
    };
    format!("{id}: snapshot {name:?} of {layers} layers, {sealed}\n")
}

/// How results are printed.
#[derive(Clone, Copy)]
struct Output {
    json: bool,
}

impl Output {
    fn print(
        self,
        text: impl FnOnce() -> String,
        value: impl FnOnce() -> Value,
    ) -> Result<(), Box<dyn Error>> {
        let text = match self.json {
            true => value().to_string() + "\n",
            false => text(),
        };
        Ok(super::print(&text)?)
    }

    fn disk(self, disk: &Value) -> Result<(), Box<dyn Error>> {
        self.print(|| list::one(disk), || disk.clone())
    }

    fn events(self, node: &Node, mut after: u64, follow: bool) -> Result<(), Box<dyn Error>> {
        loop {
            let batch = node.events(after, follow)?;
            let (next, lines) = events::lines(&batch);
            let text = match self.json {
                false => lines,
                true => {
                    let events = batch["events"].as_array().into_iter().flatten();
                    events.map(|event| format!("{event}\n")).collect()
                }
            };
            if !write(&text)? || !follow {
                return Ok(());
            }
            after = next;
        }
    }

    fn top(
        self,
        node: &Node,
        interval: Duration,
        count: Option<u64>,
    ) -> Result<(), Box<dyn Error>> {
        let clear = if io::stdout().is_terminal() && !self.json {
            CLEAR
        } else {
            ""
        };
        let mut before = top::Reading::of(&node.metrics()?);
        let mut printed = 0;
        while count.is_none_or(|count| printed < count) {
            thread::sleep(interval);
            let now = top::Reading::of(&node.metrics()?);
            let rates = now.rates_since(&before);
            let text = match self.json {
                true => serde_json::to_string(&rates)? + "\n",
                false => format!("{clear}{}", top::table(&rates)),
            };
            if !write(&text)? {
                break;
            }
            (before, printed) = (now, printed + 1);
        }
        Ok(())
    }
}

/// Writes to standard output; returns whether it is open still.
fn write(text: &str) -> Result<bool, tool::Error> {
    let mut out = io::stdout();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(tool::Error::Stdout(error)),
    }
}
