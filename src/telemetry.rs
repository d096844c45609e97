//! The log: one subscriber per process, set up once by `main`.
//!
//! Invariant: log lines go to standard error only; standard output belongs to results.

use std::io::{self, IsTerminal};

use anyhow::{Context, Result, anyhow};
use tracing_subscriber::{EnvFilter, fmt};

use crate::config::{LogConfig, LogLevel};

/// Installs the subscriber for the whole process.
///
/// `directives` is the value of `SPRAT_LOG` (such as `sprat=debug,h2=info`) and replaces the configured level. Fails if
/// it cannot be parsed, or if a subscriber is already installed.
pub fn init(log: &LogConfig, directives: Option<&str>) -> Result<()> {
    let mut builder = fmt().with_writer(io::stderr).with_env_filter(filter(log, directives)?);
    if !io::stderr().is_terminal() {
        // Only ever switched off: on a terminal the crate itself honours NO_COLOR.
        builder = builder.with_ansi(false);
    }
    if log.json { builder.json().try_init() } else { builder.try_init() }.map_err(|error| anyhow!(error))
}

fn filter(log: &LogConfig, directives: Option<&str>) -> Result<EnvFilter> {
    // Other crates speak only when something is wrong: their debug output would drown ours.
    let others = log.level.min(LogLevel::Warn);
    let own = format!("{},sprat={}", others.as_str(), log.level.as_str());
    let text = directives.filter(|text| !text.trim().is_empty()).unwrap_or(&own);
    EnvFilter::builder().parse(text).with_context(|| format!("SPRAT_LOG={text:?} is not a log filter"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(level: LogLevel, directives: Option<&str>) -> String {
        filter(&LogConfig { level, json: false }, directives).unwrap().to_string()
    }

    #[test]
    fn own_level_applies_to_our_lines_only() {
        assert_eq!(shown(LogLevel::Debug, None), "sprat=debug,warn");
        assert_eq!(shown(LogLevel::Error, None), "sprat=error,error");
        assert_eq!(shown(LogLevel::Off, Some("")), "sprat=off,off");
    }

    #[test]
    fn the_variable_replaces_the_level() {
        assert_eq!(shown(LogLevel::Error, Some("trace")), "trace");
        let error = filter(&LogConfig { level: LogLevel::Info, json: false }, Some("sprat=loud")).unwrap_err();
        assert!(error.to_string().starts_with("SPRAT_LOG=\"sprat=loud\" is not a log filter"), "{error}");
    }
}
