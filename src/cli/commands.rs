//! The commands and their own flags, with the help people read.
//!
//! Invariant: definitions only; what a flag does is said in the file of its command.

use std::{path::PathBuf, time::Duration};

use clap::Subcommand;
use clap_complete::Shell;

use crate::units::{parse_duration, parse_rate, parse_size};

/// What a process does.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// What [`run`](super::run) performs.
    #[command(flatten)]
    Action(Action),
    /// See it work: a tracker and four peers on this machine, one of them killed, one lying
    Demo(DemoOptions),
}

/// What the command line and the menu can ask for.
#[derive(Debug, Clone, Subcommand)]
pub enum Action {
    /// Start and run a network: its authority, its members, its listing
    #[command(subcommand)]
    Tracker(TrackerCommand),
    /// Certificates for people who look into a network with other tools
    #[command(subcommand)]
    Operator(OperatorCommand),
    /// Join a network with a link
    #[command(
        after_help = "Examples:\n  sprat join sprat://HOST:7700/…\n  sprat join --token-file link.txt\n  \
                            ssh tracker sprat tracker token create | sprat join -"
    )]
    Join(JoinArgs),
    /// Run a peer: share folders, serve and fetch, until stopped
    #[command(
        after_help = "Examples:\n  sprat peer --share ~/films --downloads ~/Downloads\n  \
                            sprat peer --share raw=/mnt/footage --share ~/models --advertise build1.lan:7701"
    )]
    Peer(PeerArgs),
    /// Share one more folder
    #[command(
        long_about = "Share one more folder. A running peer takes it up at once and remembers it; without one this \
                            command becomes the peer, in the foreground."
    )]
    Share(ShareArgs),
    /// List the files of the network
    #[command(
        after_help = "Examples:\n  sprat ls\n  sprat ls 'movies/*.mkv'\n  sprat ls shots/ --min-size 1GiB --json"
    )]
    Ls(ListArgs),
    /// List the files whose name contains a text, whatever its case
    Search(SearchArgs),
    /// Download files from every machine that has them
    #[command(
        long_about = "Download files from every machine that has them. What arrives is verified piece by piece; what was \
                      interrupted continues; what exists is left alone unless you say otherwise.",
        after_help = "Examples:\n  sprat get movies/film.mkv\n  sprat get 'movies/*.mkv' -o OUT/\n  sprat get shots/\n  \
                      sprat get 3f786850e387550f --json"
    )]
    Get(GetArgs),
    /// What runs here: peer, downloads, tracker
    Status(StatusArgs),
    /// Show or change how much the running peer may send and fetch a second
    #[command(
        long_about = "Show or change how much the running peer may send and fetch a second, also in transfers under way. \
                      A change holds until the peer ends.",
        after_help = "Examples:\n  sprat limit\n  sprat limit --upload 20MB --download 1GiB\n  sprat limit --upload none"
    )]
    Limit(LimitArgs),
    /// Show or change how much the running peer, or the tracker, logs
    #[command(
        long_about = "Show or change how much the running peer, or the tracker, logs. A change holds until it ends.",
        after_help = "Examples:\n  sprat log-level\n  sprat log-level debug\n  sprat log-level info --tracker"
    )]
    LogLevel(LogLevelArgs),
    /// The settings
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Completions for a shell, on standard output
    #[command(
        after_help = "Example:\n  sprat completions bash > ~/.local/share/bash-completion/completions/sprat"
    )]
    Completions {
        /// For which shell
        shell: Shell,
    },
    /// The version
    Version,
    /// The man page, on standard output
    #[command(hide = true)]
    Man,
}

/// `sprat tracker …`
#[derive(Debug, Clone, Subcommand)]
pub enum TrackerCommand {
    /// Make the authority of a new network, and nothing else
    Init,
    /// Run the tracker until stopped; makes what is missing
    #[command(
        after_help = "Examples:\n  sprat tracker run\n  sprat tracker run --listen 0.0.0.0:7700 --advertise \
                            tracker.lan:7700"
    )]
    Run(TrackerRunArgs),
    /// The links that let machines in
    #[command(subcommand)]
    Token(TokenCommand),
    /// Everybody who ever joined
    Members,
    /// Let a revoked member in again
    Approve {
        /// Its id, as `sprat tracker members` shows it
        #[arg(value_name = "PEER_ID")]
        peer: String,
    },
    /// Throw a member out
    Revoke {
        /// Its id, as `sprat tracker members` shows it
        #[arg(value_name = "PEER_ID")]
        peer: String,
    },
}

/// `sprat tracker run`
#[derive(Debug, Clone, Default, clap::Args)]
pub struct TrackerRunArgs {
    /// Address to listen on [default: every address, port 7700]
    #[arg(long, value_name = "HOST:PORT")]
    pub(super) listen: Option<String>,
    /// Address of the operator page, on loopback; none: no page [default: 127.0.0.1:7790 or the next free port]
    #[arg(long, value_name = "HOST:PORT")]
    pub(super) operator: Option<String>,
    /// Address that join links name; may be repeated [default: this machine's]
    #[arg(long, value_name = "HOST:PORT")]
    pub(super) advertise: Vec<String>,
    /// A certificate of your own, PEM, to show instead of the authority's
    #[arg(long, value_name = "FILE", requires = "certificate_key")]
    pub(super) certificate: Option<String>,
    /// Its key, PEM, encrypted or not
    #[arg(long, value_name = "FILE")]
    pub(super) certificate_key: Option<String>,
    /// File with the passphrase of the key
    #[arg(long, value_name = "FILE")]
    pub(super) key_passphrase_file: Option<String>,
    /// Keep a join link in this file, made anew before it ends or is used up, instead of printing one
    #[arg(long, value_name = "FILE")]
    pub(super) keep_token_file: Option<PathBuf>,
    /// Keep ca.crt, operator.crt and operator.key in this folder, made anew before they end
    #[arg(long, value_name = "DIR")]
    pub(super) keep_operator_certificate: Option<PathBuf>,
    /// If it cannot start, say why, wait and try again
    #[arg(long)]
    pub(super) keep_trying: bool,
}

/// `sprat tracker token …`
#[derive(Debug, Clone, Subcommand)]
pub enum TokenCommand {
    /// Make a link; it alone goes to standard output
    Create {
        /// How many machines may join with it
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
        uses: u32,
        /// How long it can be used
        #[arg(long, default_value = "24h", value_parser = parse_duration, value_name = "TIME")]
        ttl: Duration,
    },
    /// The links that can still be used, without their secrets
    List,
}

/// `sprat operator …`
#[derive(Debug, Clone, Subcommand)]
pub enum OperatorCommand {
    /// Write ca.crt, operator.crt and operator.key, for grpcurl and the like
    Cert {
        /// Folder for the three files
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// How long the certificate lives, at most 7 days
        #[arg(long, default_value = "12h", value_parser = parse_duration, value_name = "TIME")]
        ttl: Duration,
    },
}

/// `sprat join`
#[derive(Debug, Clone, clap::Args)]
pub struct JoinArgs {
    /// The link, or - to read it from standard input
    pub(super) link: Option<String>,
    /// File that holds the link
    #[arg(long, value_name = "FILE", conflicts_with = "link")]
    pub(super) token_file: Option<PathBuf>,
    /// Only write ca.crt, peer.crt and peer.key there, for another program
    #[arg(long, value_name = "DIR")]
    pub(super) identity_only: Option<PathBuf>,
}

/// `sprat peer`
#[derive(Debug, Clone, Default, clap::Args)]
pub struct PeerArgs {
    /// Folder to share; NAME= puts NAME/ before the names of its files; may be repeated
    #[arg(long, value_name = "[NAME=]DIR")]
    pub(super) share: Vec<String>,
    /// Join with the link in this file, unless this machine is a member already
    #[arg(long, value_name = "FILE")]
    pub(super) join_token_file: Option<PathBuf>,
    /// If it cannot start or join, say why, wait and try again
    #[arg(long)]
    pub(super) keep_trying: bool,
    #[command(flatten)]
    pub(super) node: Box<NodeArgs>,
}

/// How a peer runs.
#[derive(Debug, Clone, Default, clap::Args)]
pub(super) struct NodeArgs {
    /// Folder for downloads that name no other
    #[arg(long, value_name = "DIR")]
    pub(super) downloads: Option<String>,
    /// Address to listen on [default: every address, port 7701 or the next free one]
    #[arg(long, value_name = "HOST:PORT")]
    pub(super) listen: Option<String>,
    /// Address of the operator page, on loopback; none: no page [default: 127.0.0.1:7791 or the next free port]
    #[arg(long, value_name = "HOST:PORT")]
    pub(super) operator: Option<String>,
    /// Address offered to the others; may be repeated [default: all of this machine]
    #[arg(long, value_name = "HOST:PORT")]
    pub(super) advertise: Vec<String>,
    /// Another address of the tracker than the one joined
    #[arg(long, value_name = "HOST:PORT")]
    pub(super) tracker: Option<String>,
    /// Most that is sent a second, such as 20MB; `sprat limit` changes it
    #[arg(long, value_name = "RATE")]
    pub(super) upload_limit: Option<String>,
    /// Most that is fetched a second, such as 1GiB
    #[arg(long, value_name = "RATE")]
    pub(super) download_limit: Option<String>,
    /// Most that is sent a second to each other peer
    #[arg(long, value_name = "RATE")]
    pub(super) upload_limit_per_peer: Option<String>,
    /// Most that is fetched a second from each other peer
    #[arg(long, value_name = "RATE")]
    pub(super) download_limit_per_peer: Option<String>,
}

/// `sprat limit`
#[derive(Debug, Clone, Default, clap::Args)]
pub struct LimitArgs {
    /// To all other peers together; none lifts the limit
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(super) upload: Option<Rate>,
    /// From all other peers together
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(super) download: Option<Rate>,
    /// To each other peer
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(super) upload_per_peer: Option<Rate>,
    /// From each other peer
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub(super) download_per_peer: Option<Rate>,
}

/// `sprat log-level`
#[derive(Debug, Clone, Default, clap::Args)]
pub struct LogLevelArgs {
    /// The least important lines to show: off, error, warn, info, debug or trace
    pub(super) level: Option<String>,
    /// Of the tracker that runs here, instead of the peer
    #[arg(long)]
    pub(super) tracker: bool,
}

/// A limit that is asked for. The name keeps the two options apart.
pub(super) type Rate = Option<u64>;

/// `sprat share`
#[derive(Debug, Clone, clap::Args)]
pub struct ShareArgs {
    /// The folder
    pub(super) dir: PathBuf,
    /// Put NAME/ before the names of its files
    #[arg(long)]
    pub(super) name: Option<String>,
    #[command(flatten)]
    pub(super) node: Box<NodeArgs>,
}

/// Which files.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Filters {
    /// Only files of at least this size
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(super) min_size: Option<u64>,
    /// Only files of at most this size
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(super) max_size: Option<u64>,
    /// Only files that this peer offers
    #[arg(long, value_name = "PEER_ID")]
    pub(super) peer: Option<String>,
    /// The peers that offer them, instead of the files
    #[arg(long)]
    pub(super) peers: bool,
}

/// `sprat ls`
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ListArgs {
    /// Names: * and ? within a folder, ** across folders, shots/ for everything beneath
    pub(super) glob: Option<String>,
    #[command(flatten)]
    pub(super) filters: Filters,
}

/// `sprat search`
#[derive(Debug, Clone, clap::Args)]
pub struct SearchArgs {
    /// Part of a name
    pub(super) text: String,
    #[command(flatten)]
    pub(super) filters: Filters,
}

/// `sprat get`
#[derive(Debug, Clone, clap::Args)]
pub struct GetArgs {
    /// Names, globs ('movies/*.mkv', shots/) or content ids (their first 8 digits do)
    #[arg(required = true, value_name = "NAME|GLOB|CONTENTID")]
    pub(super) what: Vec<String>,
    /// Folder, if it is one, ends in / or several files match; else the file to create
    #[arg(long, short, value_name = "PATH")]
    pub(super) output: Option<PathBuf>,
    /// If a different file is in the way, replace it when the new one is complete; what they share is not fetched
    #[arg(long, conflicts_with_all = ["rename", "skip"])]
    pub(super) overwrite: bool,
    /// If a different file is in the way, take another name
    #[arg(long, conflicts_with = "skip")]
    pub(super) rename: bool,
    /// If a different file is in the way, leave it and go on
    #[arg(long)]
    pub(super) skip: bool,
    /// How long to wait while no source brings anything, or none [default: 2m]
    #[arg(
        long,
        value_name = "DURATION|none",
        value_parser = patience,
        allow_hyphen_values = true
    )]
    pub(super) timeout: Option<GetTimeout>,
}

/// How long a get waits for sources.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GetTimeout {
    /// So many seconds.
    Seconds(u32),
    /// For ever.
    Endless,
}

fn patience(text: &str) -> Result<GetTimeout, String> {
    if text == "none" {
        return Ok(GetTimeout::Endless);
    }
    let duration = parse_duration(text).map_err(|error| error.to_string())?;
    let seconds = u32::try_from(duration.as_secs()).unwrap_or(u32::MAX);
    match seconds {
        0 => Err("at least one second, or none to wait for ever".into()),
        seconds => Ok(GetTimeout::Seconds(seconds)),
    }
}

/// `sprat status`
#[derive(Debug, Clone, Default, clap::Args)]
pub struct StatusArgs {
    /// Fail unless what runs here is healthy
    #[arg(long)]
    pub(super) check: bool,
}

/// `sprat config …`
#[derive(Debug, Clone, Subcommand)]
pub enum ConfigCommand {
    /// Show every setting
    Show {
        /// Say where each value comes from
        #[arg(long)]
        origin: bool,
    },
}

/// `sprat demo`
#[derive(Debug, Clone, clap::Args)]
pub struct DemoOptions {
    /// Size of the file that is shared
    #[arg(long, default_value = "256MiB", value_parser = parse_size)]
    pub size: u64,
}
