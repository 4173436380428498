//! What the programs tell of themselves: `--help` and `--version`.

use std::process::Command;

/// The programs, and commands of `ovbd` with many options.
const COMMANDS: [(&str, &[&str]); 7] = [
    (env!("CARGO_BIN_EXE_ovbd-vhost"), &[]),
    (env!("CARGO_BIN_EXE_ovbd-node"), &[]),
    (env!("CARGO_BIN_EXE_ovbd"), &[]),
    (env!("CARGO_BIN_EXE_ovbd"), &["create"]),
    (env!("CARGO_BIN_EXE_ovbd"), &["check"]),
    (env!("CARGO_BIN_EXE_ovbd"), &["pull"]),
    (env!("CARGO_BIN_EXE_ovbd"), &["ctl"]),
];

/// Standard output of `program` in a terminal of `columns` columns.
fn output(program: &str, arguments: &[&str], columns: usize) -> String {
    let output = Command::new(program)
        .args(arguments)
        .env("COLUMNS", columns.to_string())
        .output()
        .unwrap();
    assert!(output.status.success(), "{program} {arguments:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn words(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}

#[test]
fn help_fits_the_terminal_and_breaks_no_word() {
    for (program, command) in COMMANDS {
        let arguments = [command, &["--help"]].concat();
        let wide = output(program, &arguments, 1000);
        for columns in [60, 80, 100] {
            let text = output(program, &arguments, columns);
            assert_eq!(words(&text), words(&wide), "{program} at {columns} columns");
            // The usage line and lists of literal values have words that are longer than a line.
            let too_long = text.lines().find(|line| {
                line.len() > columns && !line.starts_with("Usage:") && words(line).len() > 1
            });
            assert_eq!(too_long, None, "{program} at {columns} columns");
        }
    }
}

#[test]
fn options_of_the_daemon_are_in_groups() {
    let text = output(COMMANDS[0].0, &["--help"], 100);
    let groups: Vec<_> = text
        .lines()
        .filter(|line| !line.starts_with([' ', 'U']) && line.ends_with(':'))
        .collect();
    for group in ["Image:", "Registries:", "Writable layer:", "Performance:"] {
        assert!(groups.contains(&group), "{group} in {groups:?}");
    }
    let alone = text.split("Image:").next().unwrap();
    assert!(!alone.contains("--layers"), "each option is in its group");
}

#[test]
fn the_version_is_that_of_the_crate_and_may_have_a_commit() {
    for (program, _) in &COMMANDS[..3] {
        let text = output(program, &["--version"], 80);
        let [_, version] = words(&text)[..] else {
            panic!("expected a name and a version, found {text:?}");
        };
        let plain = version.split('+').next().unwrap();
        assert_eq!(plain, env!("CARGO_PKG_VERSION"), "{text:?}");
    }
}
