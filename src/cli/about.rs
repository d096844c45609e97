//! What the program says about itself: settings, completions, version, man page.
//!
//! Invariant: the man page is made from the definitions of the command line; `docs/sprat.1` is a copy of it.

use std::io;

use anyhow::Result;
use clap::Command as Definition;
use clap_complete::Shell;
use clap_mangen::{
    Man,
    roff::{Roff, bold, roman},
};
use serde::Serialize;
use serde_json::Value;

use super::{
    args::{Args, EXAMPLES, VARIABLES},
    commands::ConfigCommand,
    output::{json, line, print},
    session::Session,
};
use crate::{exit::Exit, safe_path::escape};

pub(super) fn config(session: &Session, command: &ConfigCommand) -> Result<()> {
    let ConfigCommand::Show {
        origin: with_origin,
    } = command;
    if session.json {
        let row = |(key, (value, origin)): (&String, &(Value, String))| {
            json(&Setting { key, value, origin })
        };
        return session.origins.iter().try_for_each(row);
    }
    if !with_origin {
        return line(&serde_json::to_string_pretty(&session.config)?);
    }
    let shown = |(key, (value, origin)): (&String, &(Value, String))| {
        line(&escape(&format!("{key} = {value}  ({origin})")))
    };
    session.origins.iter().try_for_each(shown)
}

pub(super) fn completions(shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::definitions(), "sprat", &mut script);
    print(&script)
}

pub(super) fn version(session: &Session) -> Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    if !session.json {
        return line(&format!("sprat {version}"));
    }
    let target = format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS);
    json(&Version {
        version,
        protocol: "sprat.v1",
        target,
    })
}

/// The man page, in roff: all commands on one page.
pub(super) fn man_page() -> Result<Vec<u8>> {
    let definition = Args::definitions();
    let man = Man::new(definition.clone());
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    for command in definition.get_subcommands() {
        command_section(command, "sprat", &mut page)?;
    }
    let codes = Exit::TABLE.map(|(exit, meaning)| ((exit as u8).to_string(), meaning));
    let ends = [("0".to_owned(), "done")].into_iter().chain(codes);
    let ends = ends.chain([("130, 143".to_owned(), "ended by Ctrl-C, by SIGTERM")]);
    let ends: Vec<_> = ends.collect();
    let ends: Vec<(&str, &str)> = ends
        .iter()
        .map(|(code, meaning)| (code.as_str(), *meaning))
        .collect();
    for (heading, rows) in [
        ("ENVIRONMENT", &VARIABLES[..]),
        ("EXIT STATUS", &ends),
        ("EXAMPLES", &EXAMPLES),
    ] {
        let mut roff = Roff::default();
        roff.control("SH", [heading]);
        for (word, meaning) in rows {
            roff.control("TP", [])
                .text([bold(*word)])
                .text([roman(*meaning)]);
        }
        roff.to_writer(&mut page)?;
    }
    Ok(page)
}

/// One command with its options, and the commands below it.
fn command_section(command: &Definition, parent: &str, page: &mut Vec<u8>) -> io::Result<()> {
    if command.is_hide_set() {
        return Ok(());
    }
    let name = format!("{parent} {}", command.get_name());
    if command.has_subcommands() {
        return command
            .get_subcommands()
            .try_for_each(|below| command_section(below, &name, page));
    }
    let mut roff = Roff::default();
    roff.control("SH", [name.to_uppercase().as_str()]);
    roff.to_writer(page)?;
    let man = Man::new(command.clone().bin_name(name).disable_help_flag(true));
    let mut text = Vec::new();
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    if command.get_arguments().next().is_some() {
        man.render_options_section(&mut text)?;
    }
    // Headings of a page become paragraphs of a section.
    let headings = [".SH SYNOPSIS", ".SH DESCRIPTION", ".SH OPTIONS"];
    for text in String::from_utf8_lossy(&text).lines() {
        page.extend(
            if headings.contains(&text) {
                ".PP"
            } else {
                text
            }
            .bytes()
            .chain(*b"\n"),
        );
    }
    Ok(())
}

#[derive(Serialize)]
struct Setting<'a> {
    key: &'a str,
    value: &'a Value,
    origin: &'a str,
}

#[derive(Serialize)]
struct Version {
    version: &'static str,
    protocol: &'static str,
    target: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_man_page_in_docs_is_this_one() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/sprat.1");
        let page = String::from_utf8(man_page().unwrap()).unwrap();
        assert!(
            page == std::fs::read_to_string(path).unwrap(),
            "write it anew: sprat man > docs/sprat.1"
        );
    }

    #[test]
    fn the_man_page_is_complete() {
        let page = String::from_utf8(man_page().unwrap()).unwrap();
        for part in [
            ".TH sprat 1",
            ".SH SYNOPSIS",
            "SPRAT TRACKER TOKEN CREATE",
            "SPRAT GET",
            "\\-\\-state\\-dir",
            "SPRAT_KEY_PASSPHRASE",
            "EXIT STATUS",
        ] {
            assert!(page.contains(part), "{part}");
        }
        assert!(!page.contains("SPRAT MAN"));
    }
}
