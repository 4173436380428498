//! Manual pages: generated sections, then the hand-written ones of `contrib/package/man`.

use std::error::Error;
use std::fs;
use std::path::Path;

use clap::Command;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

use super::{Program, root};

/// Writes the pages of `programs` and of their commands to `dir`.
///
/// # Errors
/// A page cannot be written.
pub fn write(
    programs: Vec<Program>,
    version: &str,
    date: &str,
    dir: &Path,
) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(dir)?;
    for program in programs {
        let mut command = program.command.disable_help_subcommand(true);
        command.build();
        let top = command.get_name().to_owned();
        write_tree(
            &command,
            &Page {
                section: program.section,
                version,
                date,
                top: &top,
            },
            dir,
        )?;
    }
    Ok(())
}

/// What the pages of one program have in common.
struct Page<'a> {
    section: &'a str,
    version: &'a str,
    date: &'a str,
    /// Name of the program.
    top: &'a str,
}

/// Writes the page of a command and those of its commands.
fn write_tree(command: &Command, page: &Page, dir: &Path) -> Result<(), Box<dyn Error>> {
    let name = command.get_display_name().unwrap_or(page.top).to_owned();
    let file = format!("{name}.{}", page.section);
    fs::write(dir.join(&file), render(command, &name, &file, page)?)?;
    let shown = command.get_subcommands().filter(|sub| !sub.is_hide_set());
    for sub in shown {
        write_tree(sub, page, dir)?;
    }
    Ok(())
}

/// The page of one command.
fn render(
    command: &Command,
    name: &str,
    file: &str,
    page: &Page,
) -> Result<String, Box<dyn Error>> {
    let man = Man::new(command.clone())
        .title(name.to_uppercase())
        .section(page.section)
        .date(page.date)
        .source(format!("ovbd-vhost {}", page.version))
        .manual("ovbd-vhost");
    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    if command
        .get_arguments()
        .any(|argument| !argument.is_hide_set())
    {
        man.render_options_section(&mut text)?;
    }
    if command.has_subcommands() {
        man.render_subcommands_section(&mut text)?;
    }
    let by_hand = root().join("contrib/package/man").join(file);
    match fs::read(&by_hand) {
        Ok(sections) => text.extend(sections),
        Err(_) if name != page.top => text.extend(see_also(page)?),
        Err(error) => return Err(format!("{}: {error}", by_hand.display()).into()),
    }
    Ok(tidy(&String::from_utf8(text)?))
}

/// Breaks the lines of a generated page as `mandoc -T lint` asks for.
fn tidy(page: &str) -> String {
    // Each generated section starts with the macro of the apostrophe.
    const APOSTROPHE: &str = ".ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n";
    let body = page
        .replace(APOSTROPHE, "")
        .replace(".br\n\n.br\n", ".sp\n");
    let mut out = APOSTROPHE.to_owned();
    let mut verbatim = false;
    for line in body.lines().map(str::trim_end) {
        verbatim = (verbatim || line == ".EX") && line != ".EE";
        match verbatim || line.starts_with('.') {
            true => out += line,
            false => fill(line, &mut out),
        }
        out.push('\n');
    }
    out
}

/// Adds the words of `line` in lines of less than 80 bytes, as long as no word is longer.
fn fill(line: &str, out: &mut String) {
    let mut column = 0;
    for word in line.split(' ').filter(|word| !word.is_empty()) {
        // At the start of a line, these characters make a request.
        let may_start = !word.starts_with(['.', '\'']);
        if column > 0 && column + word.len() >= 79 && may_start {
            out.push('\n');
            column = 0;
        } else if column > 0 {
            out.push(' ');
            column += 1;
        }
        *out += word;
        column += word.len();
    }
}

/// The reference to the page of the program.
fn see_also(page: &Page) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut roff = Roff::new();
    roff.control("SH", ["SEE ALSO"]);
    roff.text([roman(format!("{}({})", page.top, page.section))]);
    let mut text = Vec::new();
    roff.to_writer(&mut text)?;
    Ok(text)
}
