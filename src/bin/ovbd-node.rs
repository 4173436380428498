//! The `ovbd-node` service: arguments only.
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::unreachable,
        clippy::todo,
        clippy::unimplemented,
        clippy::too_many_lines
    )
)]

use std::env;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgMatches, Args as _, Command, CommandFactory, FromArgMatches, Parser};
use ovbd_vhost::io::child_status;
use ovbd_vhost::logging::{self, LogFormat};
use ovbd_vhost::node::api::ControlSocket;
use ovbd_vhost::node::shown_label::ShownLabel;
use ovbd_vhost::node::socket::{SocketMode, SocketOwner};
use ovbd_vhost::node::{self, Config};
use ovbd_vhost::registry::args::RegistryArgs;
use ovbd_vhost::version::VERSION;

/// Serve many disks on one host, by name, over an HTTP API.
#[derive(Parser)]
#[command(name = "ovbd-node", version = VERSION, max_term_width = 100)]
pub(crate) struct Args {
    /// Unix socket of the HTTP API.
    #[arg(long, value_name = "PATH")]
    control: PathBuf,

    /// Permissions of the socket of the API, in octal.
    #[arg(long, value_name = "MODE", default_value = "0600")]
    control_mode: SocketMode,

    /// Owner of the socket of the API, as USER, USER:GROUP or :GROUP [default: the user and group of the node].
    #[arg(long, value_name = "OWNER")]
    control_owner: Option<SocketOwner>,

    /// Second unix socket of the HTTP API, which serves GET only: for exporters and dashboards.
    #[arg(long, value_name = "PATH")]
    control_ro: Option<PathBuf>,

    /// Permissions of the second socket, in octal.
    #[arg(
        long,
        value_name = "MODE",
        default_value = "0660",
        requires = "control_ro"
    )]
    control_ro_mode: SocketMode,

    /// Owner of the second socket, as USER, USER:GROUP or :GROUP [default: the user and group of the node].
    #[arg(long, value_name = "OWNER", requires = "control_ro")]
    control_ro_owner: Option<SocketOwner>,

    /// Directory of state entries, one per disk; created if missing.
    #[arg(long, value_name = "DIR")]
    state: PathBuf,

    /// Directory of the disks' sockets and logs; created if missing.
    #[arg(long, value_name = "DIR")]
    run_dir: PathBuf,

    /// Directory below which requests may name files; repeatable [default: none: requests can name no file].
    #[arg(long = "allow-dir", value_name = "DIR")]
    allow_dirs: Vec<PathBuf>,

    /// Path of the ovbd-vhost program [default: ovbd-vhost in the directory of ovbd-node].
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,

    /// Format of log lines on standard error. `RUST_LOG` chooses the levels
    #[arg(long, value_name = "FORMAT", value_enum, env = logging::VARIABLE, hide_env_values = true,
          default_value_t)]
    log_format: LogFormat,

    /// Serve metrics over HTTP at this loopback address too, as http://ADDRESS:PORT/metrics [default: only on the
    /// control socket].
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics_listen: Option<SocketAddr>,

    /// Label of disks to show in the metric ovbd_disk_info, as label_KEY; repeatable [default: none].
    #[arg(long = "metrics-label", value_name = "KEY")]
    metrics_labels: Vec<ShownLabel>,

    /// Cache directory of layers from registries and of image tables, shared by all disks; created if missing
    /// [default: the one of --service-config].
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,

    #[command(flatten)]
    _registry: RegistryArgs,
}

/// Returns the options of the command line that all disks get, as they were given.
fn disk_options(matches: &ArgMatches) -> Vec<OsString> {
    let registry = RegistryArgs::augment_args(Command::new(""));
    let named = registry
        .get_arguments()
        .filter_map(|option| Some((option.get_id().as_str(), option.get_long()?)));
    let mut options = Vec::new();
    for (id, name) in named.chain([("cache", "cache")]) {
        for value in matches.get_raw(id).into_iter().flatten() {
            options.extend([format!("--{name}").into(), value.to_owned()]);
        }
    }
    options
}

fn main() -> ExitCode {
    child_status::keep();
    logging::start("info");
    let matches = Args::command().get_matches();
    let args = Args::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    logging::set_format(args.log_format);
    let beside = || {
        env::current_exe()
            .map(|itself| itself.with_file_name("ovbd-vhost"))
            .unwrap_or_default()
    };
    let config = Config {
        program: args.program.unwrap_or_else(beside),
        control: ControlSocket {
            path: args.control,
            mode: args.control_mode,
            owner: args.control_owner,
        },
        control_ro: args.control_ro.map(|path| ControlSocket {
            path,
            mode: args.control_ro_mode,
            owner: args.control_ro_owner,
        }),
        state: args.state,
        run_dir: args.run_dir,
        allow_dirs: args.allow_dirs,
        disk_options: disk_options(&matches),
        metrics_labels: args.metrics_labels,
        metrics_listen: args.metrics_listen,
    };
    match node::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            logging::report("ovbd-node", &error);
            ExitCode::FAILURE
        }
    }
}
