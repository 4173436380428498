//! Colours on a terminal.

use std::env;
use std::io::{self, IsTerminal};

/// Whether text on standard output is coloured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paint {
    on: bool,
}

/// Colour of a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    /// Damage.
    Red,
    /// Success.
    Green,
    /// A warning.
    Yellow,
}

impl Paint {
    /// Colours if standard output is a terminal that shows them, and the variable `NO_COLOR` is unset or empty
    /// (<https://no-color.org>). Call it before the sandbox is entered.
    pub fn of_stdout() -> Self {
        let is_set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
        let is_dumb = env::var_os("TERM").is_none_or(|term| term == "dumb");
        Self {
            on: io::stdout().is_terminal() && !is_set("NO_COLOR") && !is_dumb,
        }
    }

    /// Returns `line` with its first word, up to a space or one of `:;`, in a colour.
    pub fn first_word(self, colour: Colour, line: &str) -> String {
        if !self.on {
            return line.to_owned();
        }
        let end = line.find([' ', ':', ';']).unwrap_or(line.len());
        let (word, rest) = line.split_at(end);
        let code = match colour {
            Colour::Red => 31,
            Colour::Green => 32,
            Colour::Yellow => 33,
        };
        format!("\x1b[1;{code}m{word}\x1b[0m{rest}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_word_has_a_colour_if_there_are_any() {
        let line = "broken: app.obd: byte 7";
        let (on, off) = (Paint { on: true }, Paint { on: false });
        assert_eq!(off.first_word(Colour::Red, line), line);
        let red = "\x1b[1;31mbroken\x1b[0m: app.obd: byte 7";
        assert_eq!(on.first_word(Colour::Red, line), red);
        let green = "\x1b[1;32mok\x1b[0m";
        assert_eq!(on.first_word(Colour::Green, "ok"), green);
    }
}
