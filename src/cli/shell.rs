//! `completions` and `man`: made from the same tree that parses the arguments.

use std::io::Write;

use clap::CommandFactory;

use super::{Cli, CompletionsArgs, Exit, ManArgs, text};
use crate::error::{IoContext, Result};

/// `rearview completions`
pub fn completions(args: &CompletionsArgs) -> Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "rearview", &mut script);
    text::print(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Done)
}

/// `rearview man`
pub fn man(args: &ManArgs) -> Result<Exit> {
    match &args.dir {
        Some(dir) => {
            std::fs::create_dir_all(dir).context("make", dir)?;
            clap_mangen::generate_to(Cli::command(), dir).context("write manual pages to", dir)?;
        }
        None => {
            let mut page = Vec::new();
            let man = clap_mangen::Man::new(Cli::command());
            man.render(&mut page).context("write", "the manual page")?;
            let mut out = std::io::stdout().lock();
            out.write_all(&page).context("write to", "standard output")?;
        }
    }
    Ok(Exit::Done)
}
