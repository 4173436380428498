//! The shape of the command line: which options each command has.

use std::process::Command;

/// Commands without `--json`, and why.
const NO_JSON: [(&str, &str); 0] = [];

/// A command that has no commands of its own, and its help.
struct Leaf {
    name: String,
    help: String,
}

fn help(words: &[String]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_ovbd"))
        .args(words)
        .arg("--help")
        .output()
        .unwrap();
    assert!(output.status.success(), "{words:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The commands that `words` has, by its help.
fn commands(help: &str) -> Vec<String> {
    let Some((_, list)) = help.split_once("\nCommands:\n") else {
        return Vec::new();
    };
    let lines = list.lines().take_while(|line| !line.is_empty());
    let named = lines.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let names = named.filter_map(|line| line.split_whitespace().next());
    let names = names.filter(|name| *name != "help");
    names.map(str::to_owned).collect()
}

fn leaves(words: &mut Vec<String>, found: &mut Vec<Leaf>) {
    let help = help(words);
    let commands = commands(&help);
    if commands.is_empty() {
        let name = words.join(" ");
        found.push(Leaf { name, help });
    }
    for command in commands {
        words.push(command);
        leaves(words, found);
        words.pop();
    }
}

fn all() -> Vec<Leaf> {
    let mut found = Vec::new();
    leaves(&mut Vec::new(), &mut found);
    found
}

/// The options in a help text, such as `--json`.
fn options(help: &str) -> Vec<&str> {
    let words = help.lines().flat_map(|line| {
        let line = line.trim_start();
        let is_option = line.starts_with('-');
        line.split_whitespace().take(if is_option { 3 } else { 0 })
    });
    words.filter(|word| word.starts_with("--")).collect()
}

#[test]
fn every_command_that_prints_facts_prints_them_as_json() {
    let all = all();
    let names: Vec<_> = all.iter().map(|leaf| leaf.name.as_str()).collect();
    for known in [
        "create",
        "upper create",
        "cache rm",
        "ctl device",
        "node top",
    ] {
        assert!(names.contains(&known), "{known} in {names:?}");
    }
    let without = all
        .iter()
        .filter(|leaf| !options(&leaf.help).contains(&"--json"));
    let without: Vec<_> = without.map(|leaf| leaf.name.as_str()).collect();
    let excused: Vec<_> = NO_JSON.iter().map(|(name, _)| *name).collect();
    assert_eq!(
        without, excused,
        "commands without --json, without a reason in this file"
    );
}

/// Each of them has a row in the table of what it prints.
#[test]
fn every_command_has_its_json_documented() {
    let page = include_str!("../../docs/ovbd.md");
    let (_, section) = page.split_once("## JSON").unwrap();
    let section = section.split("\n## ").next().unwrap();
    for leaf in all() {
        let row = format!("`{}`", leaf.name);
        assert!(
            section.contains(&row),
            "no row {row} in docs/ovbd.md, \"JSON\""
        );
    }
}

#[test]
fn a_directory_names_a_writable_layer_wherever_its_files_do() {
    for leaf in all() {
        // In `node`, `--upper` is a directory.
        if leaf.name.starts_with("node ") {
            continue;
        }
        let options = options(&leaf.help);
        let (pair, directory) = (
            options.contains(&"--upper"),
            options.contains(&"--upper-auto"),
        );
        assert!(directory || !pair, "{} has no --upper-auto", leaf.name);
    }
}
