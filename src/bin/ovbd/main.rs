//! The `ovbd` image tool: runs the command of the command line ([`args`]).
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

pub(crate) mod args;
mod confined;
mod node;
mod options;
mod registry;
mod snapshot;
mod trace;
mod values;

use std::error::Error;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use args::{
    CheckArgs, Cli, Command, CommitArgs, CreateArgs, CreateUpperArgs, ExportArgs, InspectArgs,
    MergeArgs, SealArgs, UpperCommand,
};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use confined::Writes;
use options::{JsonArgs, Opened};
use ovbd_vhost::fetch::process;
use ovbd_vhost::image::config::Stack;
use ovbd_vhost::io::child_status;
use ovbd_vhost::logging;
use ovbd_vhost::reason::reason;
use ovbd_vhost::tool::check::{Finding, check};
use ovbd_vhost::tool::commit::commit;
use ovbd_vhost::tool::create::create;
use ovbd_vhost::tool::ctl::{self, ask};
use ovbd_vhost::tool::export::{Output, Target, export};
use ovbd_vhost::tool::inspect::inspect;
use ovbd_vhost::tool::layer_writer::{UPSTREAM_ENTRIES, Written};
use ovbd_vhost::tool::loaded_stack::LoadedStack;
use ovbd_vhost::tool::made::Made;
use ovbd_vhost::tool::merge::merge;
use ovbd_vhost::tool::open_files::{OpenFiles, StackFiles};
use ovbd_vhost::tool::output::{NewFile, Unnamed};
use ovbd_vhost::tool::paint::Paint;
use ovbd_vhost::tool::raw_image::RawImage;
use ovbd_vhost::tool::resize::resize;
use ovbd_vhost::tool::seal::{SealReport, Sealed, seal};
use ovbd_vhost::tool::{self, progress, upper};

/// Exit code for wrong usage.
const WRONG_USAGE: u8 = 2;

fn main() -> ExitCode {
    child_status::keep();
    logging::start("warn");
    if let Some(code) = process::run_if_asked() {
        return code;
    }
    let result = Cli::try_parse().map_err(Into::into).and_then(run);
    let error = match result {
        Ok(code) => return code,
        Err(error) => error,
    };
    match error.downcast_ref() {
        Some(usage) => wrong_usage(usage),
        None => {
            say(&reason(&*error));
            ExitCode::FAILURE
        }
    }
}

/// Runs a command.
fn run(cli: Cli) -> Result<ExitCode, Box<dyn Error>> {
    match cli.command {
        Command::Create(args) => return run_create(args),
        Command::Inspect(args) => run_inspect(args)?,
        Command::Check(args) => return run_check(args),
        Command::Export(args) => return run_export(args),
        Command::Upper(UpperCommand::Create(args)) => return run_create_upper(args),
        Command::Commit(args) => return run_commit(args),
        Command::Seal(args) => run_seal(&args)?,
        Command::Merge(args) => return run_merge(args),
        Command::Resize(args) => {
            let resized = resize(&args.upper.paths(), args.size, args.drop_data)?;
            print(&args.json.text(&resized)?)?;
        }
        Command::Snapshot(command) => print(&command.run()?)?,
        Command::Ctl(args) => {
            let request = args.ask.into();
            let answer = ask(&args.socket, &request)?;
            print(&match args.text {
                true => ctl::text(&request, &answer),
                false => serde_json::to_string_pretty(&answer)? + "\n",
            })?;
        }
        Command::Node(args) => args.run()?,
        Command::Pull(args) => print(&args.run()?)?,
        Command::Trace(command) => print(&command.run()?)?,
        Command::Cache(command) => {
            let (text, well) = command.run()?;
            print(&text)?;
            return Ok(code_of(well));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Exit code of a command that printed what it found.
fn code_of(well: bool) -> ExitCode {
    match well {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

fn run_inspect(args: InspectArgs) -> Result<(), Box<dyn Error>> {
    let Opened {
        sources,
        fetcher: _fetcher,
    } = args.files.files()?.into_part().open()?;
    let sandbox = confined::enter(&args.sandbox, &sources.readable(), Writes::Nothing)?;
    let files = confined::open(&args.sandbox, sources)?;
    let local_bytes = files.local_bytes();
    let stack = LoadedStack::load(files)?;
    confined::tighten(sandbox)?;
    let inspection = inspect(&stack, &local_bytes);
    Ok(print(&args.json.text(&inspection)?)?)
}

fn run_check(args: CheckArgs) -> Result<ExitCode, Box<dyn Error>> {
    let threads = args.threads.count();
    let (paint, is_json) = (Paint::of_stdout(), args.json.json);
    let bar = progress::bar("checking");
    let mut findings = Vec::new();
    let mut tell = |finding: &Finding| match is_json {
        true => {
            findings.push(finding.clone());
            Ok(())
        }
        false => bar.suspend(|| print(&(finding.painted(paint) + "\n"))),
    };
    let Opened {
        sources,
        fetcher: _fetcher,
    } = args.files.files()?.open()?;
    // Checking is parsing, so there is no second stage.
    let _sandbox = confined::enter(&args.sandbox, &sources.readable(), Writes::Nothing)?;
    let files = confined::open(&args.sandbox, sources)?;
    let summary = check(files, threads, &bar, &mut tell)?;
    let well = summary.is_ok(args.strict);
    let text = match is_json {
        true => serde_json::to_string_pretty(&summary.with(&findings, well))?,
        false => summary.painted(paint, args.strict),
    };
    print(&(text + "\n"))?;
    Ok(code_of(well))
}

fn run_export(args: ExportArgs) -> Result<ExitCode, Box<dyn Error>> {
    let start = Instant::now();
    let to = match args.output.as_os_str() == "-" {
        true if args.json.json => {
            let text = "--json writes to standard output, and so does `-o -`";
            return Err(Cli::command()
                .error(ErrorKind::ArgumentConflict, text)
                .into());
        }
        true => Output::Stdout,
        false => Output::Path(args.output.clone()),
    };
    let threads = args.threads.count();
    let Opened {
        sources,
        fetcher: _fetcher,
    } = args.files.files()?.open()?;
    let mut target = Target::open(&to)?;
    let exported = confined::answer_of_child(|| {
        let sandbox = confined::enter(&args.sandbox, &sources.readable(), Writes::OpenFile)?;
        let stack = LoadedStack::load(confined::open(&args.sandbox, sources)?)?;
        confined::tighten(sandbox)?;
        let bar = progress::bar("exporting");
        Ok(export(&stack, &mut target, threads, &bar)?.to_bytes())
    })?;
    let Some(exported) = exported else {
        return Ok(ExitCode::FAILURE);
    };
    target.publish()?;
    if let Output::Path(path) = &to {
        let written = Written::from_bytes(&exported);
        print_made(&Made::raw_image(path, written, start.elapsed()), args.json)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn run_seal(args: &SealArgs) -> Result<(), Box<dyn Error>> {
    let (start, paths) = (Instant::now(), args.upper.paths());
    let sealed = seal(&paths)?;
    if let Sealed::Now(written) = sealed {
        warn_of(written.mappings);
    }
    let report = SealReport::new(&paths.data, sealed, start.elapsed());
    Ok(print(&args.json.text(&report)?)?)
}

fn run_create(args: CreateArgs) -> Result<ExitCode, Box<dyn Error>> {
    let task = args.task()?;
    let raw = RawImage::open(&args.input())?;
    let (parent, _fetcher) = match args.parent()? {
        Some(Opened { sources, fetcher }) => (Some(sources), fetcher),
        None => (None, None),
    };
    let file = Unnamed::create(&args.to)?;
    write_layer(file, &args.to, args.json, |content| {
        let sandbox = confined::enter(&args.sandbox, &[], Writes::OpenFile)?;
        let parent = parent.map(|sources| confined::open(&args.sandbox, sources));
        let parent = parent.transpose()?.map(OpenFiles::load).transpose()?;
        confined::tighten(sandbox)?;
        let bar = progress::bar("creating");
        Ok(create(raw, parent.as_ref(), &task, content, &bar)?)
    })
}

fn run_create_upper(args: CreateUpperArgs) -> Result<ExitCode, Box<dyn Error>> {
    let (sandbox, json) = (args.sandbox, args.json);
    let (
        task,
        Opened {
            sources,
            fetcher: _fetcher,
        },
    ) = args.task()?;
    let described = confined::answer_of_child(|| {
        let entered = confined::enter(&sandbox, &sources.readable(), Writes::Nothing)?;
        let below = confined::open(&sandbox, sources)?;
        confined::tighten(entered)?;
        Ok(upper::describe(&task, below)?)
    })?;
    let Some(described) = described else {
        return Ok(ExitCode::FAILURE);
    };
    let created = upper::create(&task, &described)?;
    print(&json.text(&created)?)?;
    Ok(ExitCode::SUCCESS)
}

fn run_commit(args: CommitArgs) -> Result<ExitCode, Box<dyn Error>> {
    let task = args.task()?;
    let files = StackFiles {
        stack: Stack::default(),
        upper: Some(args.upper.paths()),
    };
    let readable = files.open()?.readable();
    let file = Unnamed::create(&args.output)?;
    write_layer(file, &args.output, args.json, |content| {
        let _sandbox = confined::enter(&args.sandbox, &readable, Writes::OpenFile)?;
        Ok(commit(&task, content, &progress::bar("committing"))?)
    })
}

fn run_merge(args: MergeArgs) -> Result<ExitCode, Box<dyn Error>> {
    let task = args.task()?;
    let file = Unnamed::create(&args.output)?;
    let Opened {
        sources,
        fetcher: _fetcher,
    } = args.files.files()?.into_part().open()?;
    write_layer(file, &args.output, args.json, |content| {
        let sandbox = confined::enter(&args.sandbox, &sources.readable(), Writes::OpenFile)?;
        let stack = LoadedStack::load(confined::open(&args.sandbox, sources)?)?;
        confined::tighten(sandbox)?;
        Ok(merge(&stack, &task, content, &progress::bar("merging"))?)
    })
}

/// Writes a layer in a confined child process, publishes it as `path`, and prints what was made.
fn write_layer(
    file: Unnamed,
    path: &Path,
    json: JsonArgs,
    work: impl FnOnce(NewFile) -> Result<Written, Box<dyn Error>>,
) -> Result<ExitCode, Box<dyn Error>> {
    let start = Instant::now();
    let content = file.content();
    let Some(written) = confined::answer_of_child(|| Ok(work(content)?.to_bytes()))? else {
        return Ok(ExitCode::FAILURE);
    };
    file.publish()?;
    let written = Written::from_bytes(&written);
    warn_of(written.mappings);
    print_made(&Made::layer(path, written, start.elapsed()), json)?;
    Ok(ExitCode::SUCCESS)
}

/// Prints what a command made.
fn print_made(made: &Made, json: JsonArgs) -> Result<(), Box<dyn Error>> {
    let text = json.text(made)?;
    Ok(print(&(text.trim_end().to_owned() + "\n"))?)
}

/// Warns if the upstream reader does not open a layer with so many mappings.
fn warn_of(mappings: usize) {
    if mappings as u64 > UPSTREAM_ENTRIES {
        say(&format!(
            "warning: the layer has {mappings} mappings; ovbd-vhost opens it, but the upstream \
         reader opens at most {UPSTREAM_ENTRIES}"
        ));
    }
}

/// Writes a result. A closed pipe is not an error.
fn print(text: &str) -> Result<(), tool::Error> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(tool::Error::Stdout(error)),
        _ => Ok(()),
    }
}

/// Prints the help, or one line about wrong arguments.
fn wrong_usage(error: &clap::Error) -> ExitCode {
    let is_help = match error.kind() {
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => true,
        _ => !error.use_stderr(),
    };
    if is_help {
        // There is no other place to report to.
        let _ = error.print();
    } else {
        let text = error.to_string();
        let text = text.trim_start_matches("error: ");
        let end = text.find("\n\nUsage:").unwrap_or(text.len());
        let end = text[..end].find("\n\nFor more").unwrap_or(end);
        let words: Vec<_> = text[..end].split_whitespace().collect();
        let words = words.join(" ").replace(" tip: ", "; ");
        say(&format!("{words}; see {} --help", command_of(text)));
    }
    match error.use_stderr() {
        true => ExitCode::from(WRONG_USAGE),
        false => ExitCode::SUCCESS,
    }
}

/// The command in the usage of an error, such as `ovbd commit`.
fn command_of(error: &str) -> String {
    let usage = error
        .split_once("Usage: ")
        .map_or("ovbd", |(_, usage)| usage);
    let words = usage.split_whitespace();
    let names = words.take_while(|word| word.bytes().all(|byte| byte.is_ascii_lowercase()));
    names.collect::<Vec<_>>().join(" ")
}

fn say(line: &str) {
    // There is no other place to report to.
    let _ = writeln!(io::stderr(), "ovbd: {line}");
}
