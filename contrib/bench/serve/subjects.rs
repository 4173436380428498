//! What is measured: images in a form, each with the daemon that serves it.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;
use crate::cached::{Registry, Stack};
use crate::data::{Data, FORMS};

/// Layers of the tall stack.
const TALL: usize = 255;
/// Files of the qcow2 chain.
const CHAIN: usize = 8;

/// The server, and the form of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Our daemon.
    Ours,
    /// Our daemon on layers of a registry that are all in its cache.
    Cached,
    /// Our daemon on a layer that holds nothing: what the front-end can do.
    Null,
    /// `qemu-storage-daemon` on uncompressed data in one file through the page cache.
    Peer,
    /// `qemu-storage-daemon` on anything else.
    Other,
}

/// One image and how to serve it.
pub struct Subject<'b> {
    /// Name in reports, and for `--only`.
    pub name: String,
    /// Its sort.
    pub kind: Kind,
    /// The files it is made of.
    pub files: Vec<PathBuf>,
    server: Server<'b>,
}

enum Server<'b> {
    /// Our daemon.
    Ours(&'b Build),
    /// Our daemon, by way of a cache.
    Cached(&'b Build, Stack),
    /// `qemu-storage-daemon` with these arguments, up to the address of the export.
    StorageDaemon(Vec<String>),
}

/// Where our daemon finds the layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// In local files.
    Files,
    /// In a registry, with an empty cache, which a download fills before anything is measured.
    Filled,
    /// In the cache that [`Source::Filled`] has filled.
    Cached,
}

/// Our daemon in one build with some arguments.
pub struct Build {
    /// What follows the plus sign in names; empty for the one under test.
    pub label: String,
    /// The binary.
    pub program: PathBuf,
    /// Its arguments beyond socket and layers.
    pub arguments: Vec<String>,
    /// Where it finds the layers.
    pub source: Source,
}

/// Names of the subjects of a quick run.
pub const QUICK: [&str; 9] = [
    "null",
    "lz4",
    "lz4@255",
    "lz4-32k",
    "zstd",
    "plain",
    "raw:io_uring",
    "qcow2:io_uring",
    "qcow2-zstd:io_uring",
];

/// The same of a full run, in sets that fit in memory: one layer and the peers, and stacks.
pub const SETS: [&[&str]; 2] = [
    &[
        "null",
        "lz4",
        "lz4-32k",
        "zstd",
        "plain",
        "raw",
        "qcow2",
        "qcow2-zlib",
        "qcow2-zstd",
    ],
    &[
        "lz4",
        "lz4@255",
        "lz4-32k",
        "lz4-32k@255",
        "zstd",
        "zstd@255",
        "plain",
        "plain@255",
        "qcow2-chain",
    ],
];

/// Whether `only`, a list of names, asks for the subject `name`: by its whole name, or by the part
/// before a colon or plus sign.
pub fn selected(only: &[String], name: &str) -> bool {
    let short = name.split([':', '+']).next().unwrap_or(name);
    let build_free = name.split('+').next().unwrap_or(name);
    only.is_empty()
        || only
            .iter()
            .any(|one| [name, short, build_free].contains(&one.as_str()))
}

/// Makes the subjects that `only` asks for, and their files where they are missing.
pub fn subjects<'b>(
    data: &Data,
    builds: &'b [Build],
    only: &[String],
    registry: &Registry,
) -> Result<Vec<Subject<'b>>> {
    let mut found = Vec::new();
    let mut add = |name: &str, kind, files: &dyn Fn() -> Result<Vec<PathBuf>>| -> Result<()> {
        let mut stack = None;
        for build in builds {
            let name = build.name(name);
            let is_absurd = kind == Kind::Null && build.source != Source::Files;
            if is_absurd || !selected(only, &name) {
                continue;
            }
            let files = files()?;
            if build.source == Source::Filled {
                stack = Some(registry.stack(&files)?);
            }
            let (kind, server) = match (build.source, &stack) {
                (Source::Files, _) | (_, None) => (kind, Server::Ours(build)),
                (_, Some(stack)) => (Kind::Cached, Server::Cached(build, stack.clone())),
            };
            found.push(Subject {
                name,
                kind,
                files,
                server,
            });
        }
        Ok(())
    };
    for form in FORMS {
        for count in [1, TALL] {
            let name = match count {
                1 => form.name.to_owned(),
                count => format!("{}@{count}", form.name),
            };
            add(&name, Kind::Ours, &|| data.layers(form, count))?;
        }
    }
    add("null", Kind::Null, &|| Ok(vec![data.empty()?]))?;
    found.extend(peers(data, only)?);
    Ok(found)
}

impl Build {
    /// What an image is called in reports if this build serves it.
    pub fn name(&self, image: &str) -> String {
        match self.label.as_str() {
            "" => image.to_owned(),
            label => format!("{image}+{label}"),
        }
    }

    /// The command that serves layers at `socket`.
    pub fn command(&self, layers: &[PathBuf], socket: &Path) -> Command {
        let mut command = self.without_layers(socket);
        for layer in layers {
            command.arg("--layers").arg(layer);
        }
        command
    }

    fn without_layers(&self, socket: &Path) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).arg("--socket").arg(socket);
        command
    }
}

/// How `qemu-storage-daemon` reads files: name, options of the file, whether in a thread that
/// polls.
const WAYS: [(&str, &str, bool); 4] = [
    ("threads", "aio=threads", false),
    ("io_uring", "aio=io_uring", false),
    ("io_uring-iothread", "aio=io_uring", true),
    ("native", "aio=native,cache.direct=on", false),
];

/// What `qemu-storage-daemon` serves.
const DISKS: [&str; 5] = ["raw", "qcow2", "qcow2-chain", "qcow2-zlib", "qcow2-zstd"];

fn peers(data: &Data, only: &[String]) -> Result<Vec<Subject<'static>>> {
    let mut found = Vec::new();
    for image in DISKS {
        for (way, options, iothread) in WAYS {
            let name = format!("{image}:{way}");
            // Reading around the page cache, or polling, is shown where it is simplest.
            let simple = matches!(image, "raw" | "qcow2");
            let shown = image == "raw" || (simple && way != "native") || way == "io_uring";
            if !shown || !selected(only, &name) {
                continue;
            }
            let files = match image {
                "raw" => vec![data.raw()?],
                "qcow2-chain" => data.chain(CHAIN)?,
                "qcow2" => vec![data.qcow2(None)?],
                compressed => vec![data.qcow2(compressed.strip_prefix("qcow2-"))?],
            };
            let cached = way != "native";
            found.push(Subject {
                name,
                kind: if simple && cached {
                    Kind::Peer
                } else {
                    Kind::Other
                },
                server: Server::StorageDaemon(storage_daemon(
                    &files,
                    image == "raw",
                    options,
                    iothread,
                )),
                files,
            });
        }
    }
    Ok(found)
}

/// Arguments of `qemu-storage-daemon` for a chain of files, up to the address of the export.
fn storage_daemon(files: &[PathBuf], raw: bool, options: &str, iothread: bool) -> Vec<String> {
    let mut arguments = Vec::new();
    if iothread {
        arguments.extend(["--object".to_owned(), "iothread,id=thread".to_owned()]);
    }
    for (number, file) in files.iter().enumerate() {
        let node = if raw {
            "disk".to_owned()
        } else {
            format!("file{number}")
        };
        arguments.push("--blockdev".to_owned());
        arguments.push(format!(
            "driver=file,node-name={node},filename={},read-only=on,locking=off,{options}",
            text(file)
        ));
        if !raw {
            let top = number + 1 == files.len();
            let name = if top {
                "disk".to_owned()
            } else {
                format!("image{number}")
            };
            let below = number
                .checked_sub(1)
                .map(|below| format!(",backing=image{below}"));
            arguments.push("--blockdev".to_owned());
            arguments.push(format!(
                "driver=qcow2,node-name={name},file={node},read-only=on{}",
                below.unwrap_or_default()
            ));
        }
    }
    let thread = if iothread { ",iothread=thread" } else { "" };
    arguments.push("--export".to_owned());
    arguments.push(format!(
        "type=vhost-user-blk,id=export,node-name=disk,num-queues=2,writable=off{thread}"
    ));
    arguments
}

impl Subject<'_> {
    /// Waits until its daemon has all layers.
    pub fn wait_until_local(&self) -> Result<()> {
        match &self.server {
            Server::Cached(_, stack) => stack.wait_until_local(),
            Server::Ours(_) | Server::StorageDaemon(_) => Ok(()),
        }
    }

    /// The command that serves it at `socket`, to a front-end with up to two queues.
    pub fn command(&self, socket: &Path) -> Command {
        match &self.server {
            Server::Ours(build) => build.command(&self.files, socket),
            Server::Cached(build, stack) => {
                let mut command = build.without_layers(socket);
                stack.name(&mut command);
                command
            }
            Server::StorageDaemon(arguments) => {
                let address = format!(",addr.type=unix,addr.path={}", text(socket));
                let (export, arguments) = arguments.split_last().expect("an export");
                let mut command = Command::new("qemu-storage-daemon");
                command.args(arguments).arg(format!("{export}{address}"));
                command
            }
        }
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}
