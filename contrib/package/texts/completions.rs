//! Completions of the shells.

use std::error::Error;
use std::fs;
use std::path::Path;

use clap_complete::Shell;
use clap_complete::generate_to;

use super::Program;

/// Where each shell looks for the completions of packages, below `/usr/share`.
const SHELLS: [(Shell, &str); 3] = [
    (Shell::Bash, "bash-completion/completions"),
    (Shell::Zsh, "zsh/vendor-completions"),
    (Shell::Fish, "fish/vendor_completions.d"),
];

/// Writes the completions of `programs` below `share`.
///
/// # Errors
/// A file cannot be written.
pub fn write(programs: Vec<Program>, share: &Path) -> Result<(), Box<dyn Error>> {
    for mut program in programs {
        let name = program.command.get_name().to_owned();
        for (shell, place) in SHELLS {
            let dir = share.join(place);
            fs::create_dir_all(&dir)?;
            let path = generate_to(shell, &mut program.command, &name, &dir)?;
            if shell == Shell::Bash {
                // bash-completion loads the file that is named as the command.
                fs::rename(path, dir.join(&name))?;
            }
        }
    }
    Ok(())
}
