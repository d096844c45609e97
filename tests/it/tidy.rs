//! The house rules that a machine can check: who may import whom, which file may name which outside crate, how long
//! files, types and functions may be, that a public type has a name of its own, and what no file may contain.
//!
//! The tables come first and are the only part to edit when the house changes. The rest is a small reader of Rust
//! tokens: it sees `use` trees, aliases and inline paths, skips comments, strings and `#[cfg(test)]` items, and needs
//! no table row to have a file.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
    slice,
};

/// Lines of a file, its `#[cfg(test)]` items not counted.
const FILE_LINES: usize = 600;
/// Lines of all `impl` blocks of one type.
const TYPE_LINES: usize = 400;
/// Lines of a function, from its `fn` to its closing brace.
const FUNCTION_LINES: usize = 100;

/// (level, module, what it may import). A module is a file below `src` without `.rs`, or a folder with all its files,
/// which may then import one another. `<4` stands for every module of a lower level than 4, `peer/` for every row above
/// that begins so. A row names only rows above it, so there can be no cycle.
const LAW: &[(u8, &str, &str)] = &[
    (0, "content", ""),
    (0, "units", ""),
    (0, "exit", ""),
    (0, "backoff", ""),
    (0, "metrics", ""),
    (0, "request", ""),
    (0, "safe_path", ""),
    (1, "config", "units"),
    (1, "have", "content"),
    (1, "identity", "safe_path"),
    (2, "token", "identity"),
    (2, "trust", "identity"),
    (2, "telemetry", "config"),
    (3, "tls", "identity token trust"),
    (4, "net", "<4"),
    (4, "catalog", "content have identity safe_path"),
    (
        5,
        "proto",
        "content have identity safe_path trust net catalog",
    ),
    (5, "operator", "identity metrics net"),
    (6, "client", "exit net proto"),
    (6, "tracker/authority", "<6"),
    (6, "tracker/certificate", "<6 tracker/authority"),
    (6, "tracker/registry", "<6"),
    (6, "tracker/store", "content catalog identity safe_path"),
    (6, "tracker/activity", "<6"),
    (6, "tracker/presence", "<6 tracker/store"),
    (
        6,
        "tracker/service",
        "<6 tracker/activity tracker/authority tracker/presence tracker/store",
    ),
    (
        6,
        "tracker/dashboard",
        "<6 tracker/activity tracker/registry tracker/store",
    ),
    (6, "tracker/enroll", "<6 tracker/authority tracker/registry"),
    (
        6,
        "tracker/metrics",
        "<6 tracker/authority tracker/registry tracker/store",
    ),
    (
        6,
        "tracker/admin",
        "<6 tracker/authority tracker/registry tracker/store",
    ),
    (
        6,
        "tracker/keep",
        "<6 tracker/authority tracker/registry tracker/admin",
    ),
    (6, "tracker/mod", "<6 tracker/"),
    (6, "peer/sharing", "<6"),
    (6, "peer/member", "<6 peer/sharing"),
    (6, "peer/limit", "identity"),
    (6, "peer/serve", "<6 peer/sharing peer/limit"),
    (6, "peer/fetch", "<6 peer/member peer/sharing peer/limit"),
    (6, "peer/control", "<6 peer/"),
    (6, "peer/metrics", "<6 peer/"),
    (6, "peer/mod", "<6 peer/"),
    (
        7,
        "cli",
        "<6 client tracker/mod tracker/certificate peer/mod peer/member",
    ),
    (8, "menu", "<6 client peer/mod cli"),
    (8, "demo", "<8"),
    (9, "main", "<9"),
    (9, "lib", ""),
];

/// (path, modules): the only modules that may name an outside crate or an item of one. No module: nobody may.
const ONLY_IN: &[(&str, &str)] = &[
    (
        "axum",
        "net operator tracker/dashboard tracker/mod peer/mod",
    ),
    ("blake3", "content"),
    ("clap", "cli"),
    ("clap_complete", "cli"),
    ("clap_mangen", "cli"),
    ("config", "config"),
    ("dialoguer", "menu"),
    ("globset", "catalog"),
    ("hyper", "net"),
    ("hyper_util", "net"),
    ("if_addrs", "net"),
    ("indicatif", "cli"),
    ("notify", "peer/sharing/watcher"),
    ("pkcs8", "tracker/certificate"),
    ("rcgen", "identity tracker/authority"),
    ("redb", "peer/sharing/index tracker/registry"),
    (
        "rustix",
        "config metrics safe_path net peer/sharing peer/mod peer/fetch/storage peer/fetch/download \
         tracker/certificate",
    ),
    (
        "rustls",
        "identity trust tls net peer/member tracker/authority tracker/certificate",
    ),
    ("tokio_rustls", "net"),
    ("tonic_health", "proto tracker/mod peer/mod"),
    ("tonic_reflection", "proto"),
    ("tracing_subscriber", "telemetry"),
    ("x509_parser", "identity tracker/authority"),
    // only net opens sockets
    ("std::net::TcpListener", "net"),
    ("std::net::TcpStream", "net"),
    ("std::net::UdpSocket", "net"),
    ("std::os::unix::net", "net"),
    ("tokio::net::TcpSocket", "net"),
    ("tokio::net::TcpStream", "net"),
    ("tokio::net::UdpSocket", "net"),
    ("tokio::net::UnixListener", "net"),
    ("tokio::net::UnixStream", "net"),
    // only safe_path creates, renames or links
    ("redb::Database::create", ""),
    ("std::fs::DirBuilder", "safe_path demo"),
    ("std::fs::File::create", "safe_path demo"),
    ("std::fs::File::create_new", "safe_path demo"),
    ("std::fs::File::options", "safe_path demo"),
    ("std::fs::OpenOptions", "safe_path demo"),
    ("std::fs::copy", "safe_path demo"),
    ("std::fs::create_dir", "safe_path demo"),
    ("std::fs::create_dir_all", "safe_path demo"),
    ("std::fs::hard_link", "safe_path demo"),
    ("std::fs::rename", "safe_path demo"),
    ("std::fs::write", "safe_path demo"),
    ("std::os::unix::fs::symlink", "safe_path demo"),
    ("tokio::fs::DirBuilder", ""),
    ("tokio::fs::File::create", ""),
    ("tokio::fs::File::create_new", ""),
    ("tokio::fs::File::options", ""),
    ("tokio::fs::OpenOptions", ""),
    ("tokio::fs::copy", ""),
    ("tokio::fs::create_dir", ""),
    ("tokio::fs::create_dir_all", ""),
    ("tokio::fs::hard_link", ""),
    ("tokio::fs::rename", ""),
    ("tokio::fs::symlink", ""),
    ("tokio::fs::write", ""),
    // every channel has a bound
    ("std::sync::mpsc::channel", ""),
    ("tokio::sync::mpsc::unbounded_channel", ""),
    ("tokio::sync::mpsc::UnboundedReceiver", ""),
    ("tokio::sync::mpsc::UnboundedSender", ""),
    ("futures_util::channel::mpsc::unbounded", ""),
];

/// (modules, paths): pure modules do no I/O, start nothing and read no clock; the store does not know the wire; where one row
/// of `LAW` holds several files, those below do not look up.
const NEVER_IN: &[(&str, &str)] = &[
    (
        "content have backoff peer/fetch/picker peer/fetch/pace peer/limit/fair_queue",
        "tokio tonic std::fs std::net std::thread std::time::Instant::now std::time::SystemTime::now",
    ),
    (
        "config identity token safe_path",
        "tokio tonic std::net::TcpStream",
    ),
    (
        "tracker/store",
        "tonic::Status tonic::Request tonic::Response",
    ),
    (
        "cli",
        "crate::cli::Action crate::cli::Args crate::cli::Command crate::cli::Ended crate::cli::Session crate::cli::Stop \
         crate::cli::exit_code crate::cli::finish crate::cli::message crate::cli::note crate::cli::run",
    ),
    ("config/leaf", "crate::config::file crate::config::layers"),
    ("config/file", "crate::config::layers"),
];

/// What an error's text comes from or is called, and the methods that look for words in a text.
const TEXTS_OF_ERRORS: &[&str] = &[
    "cause",
    "e",
    "err",
    "error",
    "message",
    "reason",
    "status",
    "to_string",
    "trouble",
    "why",
];
const LOOKS_FOR_WORDS: &[&str] = &[
    "contains",
    "ends_with",
    "eq_ignore_ascii_case",
    "find",
    "matches",
    "rsplit_once",
    "split_once",
    "starts_with",
    "strip_prefix",
    "strip_suffix",
];

/// Types of the download engine that are too long until it is taken apart.
const LONG_TYPES: &[&str] = &[
    "Contents",
    "Engine",
    "Picker",
    "Run",
    "SourceSession",
    "Sources",
    "Storage",
];
/// Public names that mean another thing in the download engine, until it has been gone through.
const DOUBLED_NAMES: &[&str] = &["Have", "Subject"];

/// Words that mark unfinished work, and folders of the machines that sprat is built on.
const NO_WORDS: &[&str] = &[
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("X", "XX"),
];
const NO_PATHS: &[&str] = &[concat!("/", "work/")];

#[test]
fn imports_follow_the_law() {
    let sources = sources();
    let planned = LAW.iter().map(|row| row.1.to_owned());
    let modules: BTreeSet<String> = sources
        .iter()
        .map(|source| source.module.clone())
        .chain(planned)
        .collect();
    let mut bad = Vec::new();
    for source in &sources {
        let Some(from) = row(&source.module) else {
            bad.push(format!(
                "src/{}.rs has no row in the table LAW",
                source.module
            ));
            continue;
        };
        for (line, path) in source.paths() {
            let Some(target) = module_of(&path, &modules) else {
                continue;
            };
            if target != source.module && !row(&target).is_some_and(|to| may_import(from, to)) {
                bad.push(format!(
                    "{} may not import {}",
                    source.at(line),
                    path.join("::")
                ));
            }
        }
    }
    none(bad);
}

#[test]
fn the_law_has_no_cycles() {
    let mut bad = Vec::new();
    for (i, (level, module, imports)) in LAW.iter().enumerate() {
        for word in imports.split_whitespace() {
            let fine = match word.strip_prefix('<') {
                Some(bound) => bound.parse::<u8>().is_ok_and(|bound| bound <= *level),
                None => LAW[..i]
                    .iter()
                    .any(|above| names(word, above.1) && above.0 <= *level),
            };
            if !fine {
                bad.push(format!("row {module}: {word} is not a row above it"));
            }
            if let (Some((service, _)), Some((other, _))) =
                (module.split_once('/'), word.split_once('/'))
                && service != other
            {
                bad.push(format!(
                    "row {module}: {service} and {other} know nothing of each other"
                ));
            }
        }
    }
    none(bad);
}

#[test]
fn outside_items_are_named_where_they_may_be() {
    none(sources().iter().flat_map(Source::misplaced).collect());
}

#[test]
fn nothing_is_decided_by_the_words_of_an_error() {
    none(sources().iter().flat_map(Source::word_hunts).collect());
}

#[test]
fn files_and_functions_stay_small() {
    let mut bad = Vec::new();
    for source in sources() {
        if source.lines > FILE_LINES {
            bad.push(format!(
                "src/{}.rs: {} lines, at most {FILE_LINES}",
                source.module, source.lines
            ));
        }
        if !source.documented {
            bad.push(format!(
                "src/{}.rs does not open with //! docs",
                source.module
            ));
        }
        for (line, name, lines) in source.functions() {
            if lines > FUNCTION_LINES {
                bad.push(format!(
                    "{} fn {name}: {lines} lines, at most {FUNCTION_LINES}",
                    source.at(line)
                ));
            }
        }
    }
    none(bad);
}

#[test]
fn types_stay_small() {
    let sources = sources();
    let mut definitions = BTreeMap::<String, BTreeSet<&str>>::new();
    for source in &sources {
        for (_, name, _) in source.types() {
            definitions.entry(name).or_default().insert(&source.module);
        }
    }
    let mut lengths = BTreeMap::<(&str, String), usize>::new();
    for source in &sources {
        for (name, lines) in source.impls() {
            // Of several types with one name, the one that is defined here, or nearest above.
            let modules = definitions.get(&name).into_iter().flatten();
            let above = modules
                .clone()
                .filter(|m| covers(folder(m), &source.module));
            let module = above.max_by_key(|m| m.len()).or_else(|| modules.min());
            let module = module.copied().unwrap_or_default();
            *lengths.entry((module, name)).or_default() += lines;
        }
    }
    lengths.retain(|_, lines| *lines > TYPE_LINES);
    let long = lengths.iter().map(|((module, name), lines)| {
        let text = format!("src/{module}.rs: impl {name}: {lines} lines, at most {TYPE_LINES}");
        (name.as_str(), text)
    });
    none(all_but(LONG_TYPES, long.collect()));
}

#[test]
fn a_public_type_name_means_one_thing() {
    let sources = sources();
    let mut places = BTreeMap::<String, Vec<String>>::new();
    for source in &sources {
        for (line, name, _) in source.types().into_iter().filter(|(_, _, public)| *public) {
            places.entry(name).or_default().push(source.at(line));
        }
    }
    places.retain(|_, at| at.len() > 1);
    let doubled = places
        .iter()
        .map(|(name, at)| (name.as_str(), format!("{name}: {}", at.join(" "))));
    none(all_but(DOUBLED_NAMES, doubled.collect()));
}

#[test]
fn no_file_speaks_of_unfinished_work_or_of_the_build_machine() {
    let mut bad = Vec::new();
    for path in tracked() {
        let Ok(text) = fs::read_to_string(root().join(&path)) else {
            continue;
        };
        for (i, line) in text.lines().enumerate() {
            let mut words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
            if words.any(|word| NO_WORDS.contains(&word))
                || NO_PATHS.iter().any(|needle| line.contains(needle))
            {
                bad.push(format!("{}:{}: {}", path.display(), i + 1, line.trim()));
            }
        }
    }
    none(bad);
}

#[test]
fn the_reader_sees_through_aliases_and_skips_tests() {
    let text = r##"//! Docs naming crate::peer::Node.
        use crate::{config, peer::{picker::Picker, self as p}};
        use std::{fs::{self, File,}, sync::mpsc,};
        fn f<'a>(x: &'a str) -> char { let _ = r#"tokio::net"#; fs::write(x, "}"); File::create(x); '{' }
        mod inner { fn g() { super::h(mpsc::channel()); config::Config::default(); p::Node::start() } }
        #[cfg(test)]
        mod tests { use redb::Database; fn long() {} pub struct Hidden; }
        pub(crate) struct Shown<T: Fn() -> u8>(T); #[derive(Clone)] enum Own { One }
        impl<T: Fn() -> u8> fs::Read for p::Shown<T> where T: Send {
            type Item = T; fn h() -> impl Sized {}
        }
        pub fn after() -> impl Sized + use<> { redb::Database::builder() }"##;
    let source = Source::read("tracker/service", text);
    let paths: BTreeSet<String> = source
        .paths()
        .into_iter()
        .map(|(_, path)| path.join("::"))
        .collect();
    for expected in [
        "crate::peer::picker::Picker",
        "crate::peer::Node::start",
        "crate::config::Config::default",
        "crate::tracker::service::h",
        "std::fs::write",
    ] {
        assert!(paths.contains(expected), "{expected} is not in {paths:?}");
    }
    assert!(
        !paths.contains("redb::Database") && !paths.contains("tokio::net"),
        "{paths:?}"
    );
    assert_eq!(
        source.misplaced().len(),
        4,
        "write, create, channel, redb: {:?}",
        source.misplaced()
    );
    let hunts = |text| Source::read("net", text).word_hunts().len();
    assert_eq!(hunts(r#"fn f() { why.is_some_and(|w| w.len() > 1) }"#), 0);
    assert_eq!(
        hunts(r#"fn f() { names.contains("x"); why.contains(&name) }"#),
        0
    );
    assert_eq!(hunts(r#"fn f() { error.to_string().contains("x") }"#), 1);
    assert_eq!(
        hunts(r#"fn f() { why.as_ref().is_some_and(|w| w.starts_with("x")) }"#),
        1
    );
    assert_eq!(hunts(r#"fn f() { self.status.message().find('x') }"#), 1);
    assert_eq!(
        source
            .functions()
            .iter()
            .map(|f| f.1.as_str())
            .collect::<Vec<_>>(),
        ["f", "g", "h", "after"]
    );
    let types = source.types();
    let types = types
        .iter()
        .map(|(_, name, public)| (name.as_str(), *public));
    assert_eq!(
        types.collect::<Vec<_>>(),
        [("Shown", true), ("Own", false), ("Item", false)]
    );
    assert_eq!(source.impls(), [("Shown".to_owned(), 3)]);
    assert_eq!((source.lines, source.documented), (10, true));
    let modules = BTreeSet::from(["peer/mod".to_owned(), "peer/picker".to_owned()]);
    let target = |path: &str| {
        module_of(
            &path.split("::").map(str::to_owned).collect::<Vec<_>>(),
            &modules,
        )
    };
    assert_eq!(
        target("crate::peer::picker::Picker").as_deref(),
        Some("peer/picker")
    );
    assert_eq!(target("crate::peer::Node").as_deref(), Some("peer/mod"));
    assert_eq!(target("std::fs"), None);
}

type Row = (u8, &'static str, &'static str);
type CratePath = Vec<String>;

fn row(module: &str) -> Option<&'static Row> {
    LAW.iter().find(|row| covers(row.1, module))
}

fn may_import(from: &Row, to: &Row) -> bool {
    let allows = |word: &str| match word.strip_prefix('<') {
        Some(bound) => bound.parse().is_ok_and(|bound: u8| to.0 < bound),
        None => names(word, to.1),
    };
    from.1 == to.1 || from.2.split_whitespace().any(allows)
}

/// Whether a word of the table stands for this row.
fn names(word: &str, module: &str) -> bool {
    word == module || (word.ends_with('/') && module.starts_with(word))
}

/// The folder of a module's children.
fn folder(module: &str) -> &str {
    module.strip_suffix("/mod").unwrap_or(module)
}

/// Whether `name` is the module or a folder above it.
fn covers(name: &str, module: &str) -> bool {
    module
        .strip_prefix(name)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn starts_with(path: &[String], prefix: &str) -> bool {
    let mut segments = path.iter();
    prefix
        .split("::")
        .all(|part| segments.next().is_some_and(|segment| segment == part))
}

/// The file that a path of this crate leads into; `lib` when it names an item of the crate's root.
fn module_of(path: &[String], modules: &BTreeSet<String>) -> Option<String> {
    let inside = path.strip_prefix(&["crate".to_owned()])?;
    let names = (1..=inside.len()).rev().map(|n| inside[..n].join("/"));
    let file = names
        .flat_map(|name| [format!("{name}/mod"), name])
        .find(|name| modules.contains(name));
    Some(file.unwrap_or_else(|| "lib".to_owned()))
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// What is found, without what is allowed; an allowance that nothing needs is found too.
fn all_but(allowed: &[&str], mut found: BTreeMap<&str, String>) -> Vec<String> {
    let unused = allowed
        .iter()
        .filter(|name| found.remove(**name).is_none())
        .map(|name| format!("{name} needs no exception any more"))
        .collect::<Vec<_>>();
    found.into_values().chain(unused).collect()
}

#[track_caller]
fn none(bad: Vec<String>) {
    assert!(
        bad.is_empty(),
        "{} against the house rules:\n{}",
        bad.len(),
        bad.join("\n")
    );
}

/// Every text that belongs to the project: what git knows and what it would add.
fn tracked() -> Vec<PathBuf> {
    let git = Command::new("git")
        .args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .current_dir(root())
        .output();
    match git {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout)
            .split_terminator('\0')
            .map(PathBuf::from)
            .collect(),
        _ => rust_files(&root().join("src")),
    }
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder)
        .expect("the folder can be read")
        .map(|entry| entry.expect("an entry").path());
    let mut files: Vec<PathBuf> = entries
        .flat_map(|p| if p.is_dir() { rust_files(&p) } else { vec![p] })
        .collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "rs"));
    files.sort();
    files
}

/// All product files below `src`; files that exist only for tests are left out.
fn sources() -> Vec<Source> {
    let folder = root().join("src");
    let mut sources = Vec::new();
    for path in rust_files(&folder) {
        let module = path
            .strip_prefix(&folder)
            .expect("below src")
            .with_extension("");
        let text = fs::read_to_string(&path).expect("a source file can be read");
        sources.push(Source::read(&module.to_string_lossy(), &text));
    }
    let tests: BTreeSet<String> = sources
        .iter()
        .flat_map(|source| source.test_modules.clone())
        .collect();
    sources.retain(|source| !tests.iter().any(|test| covers(test, &source.module)));
    sources
}

struct Token {
    line: usize,
    text: String,
}

/// One file's product code.
struct Source {
    module: String,
    lines: usize,
    documented: bool,
    test_modules: Vec<String>,
    tokens: Vec<Token>,
}

impl Source {
    fn read(module: &str, text: &str) -> Self {
        let mut source = Self {
            module: module.to_owned(),
            lines: text.lines().count(),
            documented: text.starts_with("//!"),
            test_modules: Vec::new(),
            tokens: tokens(text),
        };
        let attribute = ["#", "[", "cfg", "(", "test", ")", "]"];
        while let Some(start) = source
            .tokens
            .windows(7)
            .position(|w| w.iter().map(|t| &t.text).eq(attribute))
        {
            let end = source.item_end(start + attribute.len());
            let item: Vec<Token> = source.tokens.drain(start..end).collect();
            source.lines -= item[item.len() - 1].line - item[0].line + 1;
            if let [.., keyword, name, last] = &item[..]
                && (keyword.text.as_str(), last.text.as_str()) == ("mod", ";")
            {
                source.test_modules.push(
                    [&source.scope()[1..], slice::from_ref(&name.text)]
                        .concat()
                        .join("/"),
                );
            }
        }
        source
    }

    fn at(&self, line: usize) -> String {
        format!("src/{}.rs:{line}:", self.module)
    }

    fn text(&self, i: usize) -> &str {
        self.tokens.get(i).map_or("", |token| &token.text)
    }

    fn is_name(&self, i: usize) -> bool {
        self.text(i)
            .starts_with(|c: char| c.is_alphabetic() || c == '_')
    }

    /// One past the `;` or the closing brace of the item that begins at `start`.
    fn item_end(&self, start: usize) -> usize {
        let mut depth = 0_usize;
        for i in start..self.tokens.len() {
            match self.text(i) {
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" if depth == 0 => return i,
                "}" if depth == 1 => return i + 1,
                ")" | "]" | "}" => depth -= 1,
                ";" if depth == 0 => return i + 1,
                _ => {}
            }
        }
        self.tokens.len()
    }

    /// (line, name, length in lines) of every function with a body.
    fn functions(&self) -> Vec<(usize, String, usize)> {
        let starts =
            (0..self.tokens.len()).filter(|&i| self.text(i) == "fn" && self.is_name(i + 1));
        let lines = starts.map(|i| {
            let last = &self.tokens[self.item_end(i) - 1];
            (
                self.tokens[i].line,
                self.text(i + 1).to_owned(),
                last.line - self.tokens[i].line + 1,
            )
        });
        lines.collect()
    }

    /// (line, name, whether other files can name it) of every type and trait.
    fn types(&self) -> Vec<(usize, String, bool)> {
        let keywords = ["struct", "enum", "union", "trait", "type"];
        let starts = (0..self.tokens.len())
            .filter(|&i| keywords.contains(&self.text(i)) && self.is_name(i + 1));
        let types = starts.map(|i| {
            let before = self.tokens[..i].iter().rev().map(|t| t.text.as_str());
            let visible = before.take_while(|text| !["{", "}", ";", "]"].contains(text));
            let public = visible.last() == Some("pub");
            (self.tokens[i].line, self.text(i + 1).to_owned(), public)
        });
        types.collect()
    }

    /// (name of the type, length in lines) of every `impl` block.
    fn impls(&self) -> Vec<(String, usize)> {
        let begins = |i: usize| {
            let before = i.checked_sub(1).map_or("", |i| self.text(i));
            self.text(i) == "impl" && ["", "{", "}", ";", "]", "unsafe"].contains(&before)
        };
        let starts = (0..self.tokens.len()).filter(|&i| begins(i));
        let blocks = starts.map(|start| {
            let (mut depth, mut name, mut i) = (0_usize, "", start + 1);
            while depth > 0 || !["{", "where", ""].contains(&self.text(i)) {
                match self.text(i) {
                    "<" => depth += 1,
                    ">" if self.text(i - 1) != "-" => depth -= 1,
                    "for" if depth == 0 => name = "",
                    _ if depth == 0 && self.is_name(i) => name = self.text(i),
                    _ => {}
                }
                i += 1;
            }
            let last = &self.tokens[self.item_end(start) - 1];
            (name.to_owned(), last.line - self.tokens[start].line + 1)
        });
        blocks.collect()
    }

    /// The file's own place: `crate`, then the modules down to it.
    fn scope(&self) -> CratePath {
        let inside = folder(&self.module)
            .split('/')
            .filter(|name| !["lib", "main"].contains(name));
        ["crate"]
            .into_iter()
            .chain(inside)
            .map(str::to_owned)
            .collect()
    }

    /// Every path in the code with its line, made absolute: `self`, `super` and the names that `use` and `mod` bring in
    /// are written out.
    fn paths(&self) -> Vec<(usize, CratePath)> {
        let (mut found, mut aliases) = (Vec::new(), Vec::new());
        let (mut scope, mut depth, mut inline, mut i) = (self.scope(), 0, Vec::new(), 0);
        while i < self.tokens.len() {
            let line = self.tokens[i].line;
            match self.text(i) {
                "{" => depth += 1,
                "}" => {
                    depth -= 1;
                    if inline.pop_if(|opened| *opened == depth).is_some() {
                        scope.pop();
                    }
                }
                "mod" if self.is_name(i + 1) => {
                    let child = [&scope[..], &[self.text(i + 1).to_owned()]].concat();
                    aliases.push((self.text(i + 1).to_owned(), child.clone()));
                    if self.text(i + 2) == "{" {
                        inline.push(depth);
                        scope = child;
                    }
                    i += 1;
                }
                "use" if self.text(i + 1) != "<" => {
                    let first = aliases.len();
                    i = self.use_tree(i + 1, &[], &mut aliases);
                    for (_, path) in &mut aliases[first..] {
                        *path = absolute(path, &scope);
                        found.push((line, path.clone()));
                    }
                }
                _ if self.is_name(i) && self.text(i + 1) == "::" => {
                    let begin = i == 0 || !["::", "."].contains(&self.text(i - 1));
                    let mut path = vec![self.text(i).to_owned()];
                    while self.text(i + 1) == "::" && self.is_name(i + 2) {
                        i += 2;
                        path.push(self.text(i).to_owned());
                    }
                    if begin {
                        found.push((line, absolute(&path, &scope)));
                    }
                }
                _ => {}
            }
            i += 1;
        }
        for _ in 0..2 {
            found = found
                .into_iter()
                .flat_map(|(line, path)| expand(line, path, &aliases))
                .collect();
        }
        found
    }

    /// Reads one branch of a `use` tree, adds (name, path) for each leaf, and returns the position after it.
    fn use_tree(
        &self,
        begin: usize,
        prefix: &[String],
        leaves: &mut Vec<(String, CratePath)>,
    ) -> usize {
        let (mut i, mut path) = (begin, prefix.to_vec());
        loop {
            match self.text(i) {
                "::" => i += 1,
                "{" => {
                    while self.text(i) != "}" && i < self.tokens.len() {
                        i = self.use_tree(i + 1, &path, leaves);
                    }
                    return i + 1;
                }
                "as" => {
                    leaves.push((self.text(i + 1).to_owned(), path));
                    return i + 2;
                }
                "," | ";" | "}" | "" => {
                    if let Some(name) = path.last().filter(|_| i > begin) {
                        leaves.push((name.clone(), path));
                    }
                    return i;
                }
                "self" if !path.is_empty() => i += 1,
                name => {
                    path.push(name.to_owned());
                    i += 1;
                }
            }
        }
    }

    /// Where a literal is looked for in the text of an error. Literals are no tokens, so `("x")` is read as `()`.
    fn word_hunts(&self) -> Vec<String> {
        let is_hunt = |i: usize| {
            self.text(i) == "."
                && LOOKS_FOR_WORDS.contains(&self.text(i + 1))
                && self.text(i + 2) == "("
                && self.text(i + 3) == ")"
        };
        let hunts = (1..self.tokens.len()).filter(|&i| is_hunt(i) && self.is_text_of_error(i));
        hunts
            .map(|i| {
                format!(
                    "{} .{} looks for words in an error: give it a kind",
                    self.at(self.tokens[i].line),
                    self.text(i + 1)
                )
            })
            .collect()
    }

    /// Whether the value before the `.` at `i`, or the one whose closure has it as its argument, comes of an error.
    fn is_text_of_error(&self, i: usize) -> bool {
        // `why . is_some_and ( | w | w . contains`
        let is_argument = i >= 8 && self.text(i - 2) == "|" && self.text(i - 4) == "|";
        self.comes_of_error(i - 1) || (is_argument && self.comes_of_error(i - 8))
    }

    /// Whether a chain of fields and of calls without arguments, with its end at `at`, names an error.
    fn comes_of_error(&self, mut at: usize) -> bool {
        loop {
            if at >= 2 && self.text(at) == ")" && self.text(at - 1) == "(" {
                at -= 2;
            }
            if TEXTS_OF_ERRORS.contains(&self.text(at)) {
                return true;
            }
            if at < 2 || self.text(at - 1) != "." {
                return false;
            }
            at -= 2;
        }
    }

    /// What stands in this file although `ONLY_IN` or `NEVER_IN` say that it belongs elsewhere.
    fn misplaced(&self) -> Vec<String> {
        let here = |modules: &str| {
            modules
                .split_whitespace()
                .any(|name| covers(name, &self.module))
        };
        let mut bad = BTreeSet::new();
        for (line, path) in self.paths() {
            for (item, modules) in ONLY_IN
                .iter()
                .filter(|(item, modules)| starts_with(&path, item) && !here(modules))
            {
                let place = if modules.is_empty() {
                    "nowhere"
                } else {
                    modules
                };
                bad.insert((
                    line,
                    format!("{} {item} may be named in: {place}", self.at(line)),
                ));
            }
            for item in NEVER_IN
                .iter()
                .filter(|(modules, _)| here(modules))
                .flat_map(|(_, items)| items.split(' '))
            {
                if starts_with(&path, item) {
                    bad.insert((
                        line,
                        format!("{} {item} may not be named here", self.at(line)),
                    ));
                }
            }
        }
        bad.into_iter().map(|(_, text)| text).collect()
    }
}

/// Writes out `self`, `super` and the binary's name for the library.
fn absolute(path: &[String], scope: &[String]) -> CratePath {
    let supers = path.iter().take_while(|name| *name == "super").count();
    match path[0].as_str() {
        "super" => [
            &scope[..scope.len().saturating_sub(supers).max(1)],
            &path[supers..],
        ]
        .concat(),
        "self" => [scope, &path[1..]].concat(),
        "sprat" => [&["crate".to_owned()], &path[1..]].concat(),
        _ => path.to_vec(),
    }
}

/// Replaces a leading name by what `use` or `mod` bound to it; several bindings of one name give several paths.
fn expand(
    line: usize,
    path: CratePath,
    aliases: &[(String, CratePath)],
) -> Vec<(usize, CratePath)> {
    let bound = aliases
        .iter()
        .filter(|(name, target)| *name == path[0] && target[0] != path[0]);
    let written_out: Vec<_> = bound
        .map(|(_, target)| (line, [&target[..], &path[1..]].concat()))
        .collect();
    if written_out.is_empty() {
        vec![(line, path)]
    } else {
        written_out
    }
}

/// Names, numbers, `::` and single signs; comments, strings, characters and lifetimes are left out.
fn tokens(text: &str) -> Vec<Token> {
    let (mut found, mut rest, mut line) = (Vec::new(), text, 1);
    while let Some(first) = rest.chars().next() {
        let name = rest
            .find(|c: char| !c.is_alphanumeric() && c != '_')
            .unwrap_or(rest.len());
        let skipped = literal_len(rest);
        let length = [skipped, name, first.len_utf8()]
            .into_iter()
            .find(|n| *n > 0)
            .unwrap_or(1);
        let length = if rest.starts_with("::") { 2 } else { length };
        if skipped == 0 && !first.is_whitespace() {
            found.push(Token {
                line,
                text: rest[..length].to_owned(),
            });
        }
        line += rest[..length].matches('\n').count();
        rest = &rest[length..];
    }
    found
}

/// Length in bytes of the comment, string, character or lifetime that `text` begins with, or 0.
fn literal_len(text: &str) -> usize {
    let upto = |end: Option<usize>, more: usize| end.map_or(text.len(), |at| at + more);
    if text.starts_with("//") {
        return upto(text.find('\n'), 0);
    }
    if text.starts_with("/*") {
        return upto(text.find("*/"), 2);
    }
    let body = text.trim_start_matches(['b', 'c', 'r']);
    let prefix = &text[..text.len() - body.len()];
    let hashes = body.len() - body.trim_start_matches('#').len();
    if ["r", "br", "cr"].contains(&prefix) && body[hashes..].starts_with('"') {
        let close = format!("\"{}", "#".repeat(hashes));
        let from = prefix.len() + hashes + 1;
        return upto(text[from..].find(&close).map(|at| from + at), close.len());
    }
    if ["", "b", "c"].contains(&prefix) && body.starts_with('"') {
        return prefix.len() + 1 + quoted_len(&body[1..], '"');
    }
    let Some(inner) = body
        .strip_prefix('\'')
        .filter(|_| ["", "b"].contains(&prefix))
    else {
        return 0;
    };
    let mut chars = inner.chars();
    match (chars.next(), chars.next()) {
        (Some('\\'), _) | (_, Some('\'')) => prefix.len() + 1 + quoted_len(inner, '\''),
        _ => {
            1 + inner
                .find(|c: char| !c.is_alphanumeric() && c != '_')
                .unwrap_or(inner.len())
        }
    }
}

/// Length in bytes up to and with the closing quote; a backslash takes the next character with it.
fn quoted_len(text: &str, quote: char) -> usize {
    let mut escaped = false;
    let end = text.find(|c: char| {
        let ends = c == quote && !escaped;
        escaped = c == '\\' && !escaped;
        ends
    });
    end.map_or(text.len(), |at| at + 1)
}
