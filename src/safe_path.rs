//! Names from strangers, and every file this program creates.
//!
//! Invariant: a [`SafeName`] joined to a folder lies inside that folder, reads the same on every machine, and carries no
//! character that moves a cursor, hides itself or turns text around. A name that breaks a rule is refused, never
//! repaired; only its Unicode form is unified (NFC), so that one name is one name on every system. What text cannot
//! promise (symbolic links, races, files in the way) the kernel does: [`Root`] resolves beneath an open folder without
//! following links and never replaces a file. Nothing else in the crate may create a file in a user's folder.
//!
//! Names that only Windows dislikes (`CON`, `a:b`, a trailing dot) are accepted: they are harmless here and refusing
//! them would hide a member's files from everybody.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use thiserror::Error;
use unicode_normalization::{UnicodeNormalization, is_nfc};

mod part;
mod private;
mod root;

pub use part::{Folder, PartFile, PublishError};
pub use private::{
    create_private, lock, private_dir, read_private, set_aside, writable, write_private,
};
pub use root::{Root, open_beneath_folder};

/// Longest name in bytes, in NFC.
pub const MAX_NAME_LEN: usize = 1024;
/// Longest component in bytes, in NFC: what Linux file systems take.
pub const MAX_COMPONENT_LEN: usize = 255;
/// Most components in a name.
pub const MAX_DEPTH: usize = 32;

/// A decomposed name may be longer than its NFC form; beyond this it is refused before any work is spent on it.
const MAX_RAW_LEN: usize = 4 * MAX_NAME_LEN;
/// Our own folder, wherever we need one inside a user's folder.
const OWN_FOLDER: &str = ".sprat";
/// Ending of a file that is still being downloaded.
const PART_SUFFIX: &str = ".part";
/// Longest ending, with its dot, that [`SafeName::numbered`] keeps at the end.
const MAX_EXTENSION_LEN: usize = 16;

/// A file's name relative to its share root, `/` between components: proven harmless, in NFC.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SafeName(Arc<str>);

/// The rule a name breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum NameError {
    /// No characters at all.
    #[error("the name is empty")]
    Empty,
    /// More than [`MAX_NAME_LEN`] bytes.
    #[error("the name is longer than {MAX_NAME_LEN} bytes")]
    TooLong,
    /// A component of more than [`MAX_COMPONENT_LEN`] bytes.
    #[error("a component of the name is longer than {MAX_COMPONENT_LEN} bytes")]
    ComponentTooLong,
    /// More than [`MAX_DEPTH`] components.
    #[error("the name has more than {MAX_DEPTH} components")]
    TooDeep,
    /// The name begins with `/`.
    #[error("the name is absolute")]
    Absolute,
    /// `a//b`, or a `/` at the end.
    #[error("the name has an empty component")]
    EmptyComponent,
    /// A component `.` or `..`.
    #[error("the name has a '.' or '..' component")]
    DotComponent,
    /// A character that is never part of a name: backslash, control, text direction, invisible.
    #[error("the name has the forbidden character U+{:04X}", u32::from(*.0))]
    Character(char),
    /// A name that sprat uses for its own files.
    #[error("the name is one of sprat's own ('{OWN_FOLDER}' or ending in '{PART_SUFFIX}')")]
    Reserved,
    /// A local path that is not UTF-8.
    #[error("the name is not UTF-8")]
    NotUtf8,
}

impl SafeName {
    /// Checks a name from anywhere, and brings it to NFC.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        if text.len() > MAX_RAW_LEN {
            return Err(NameError::TooLong);
        }
        let name: Arc<str> = if is_nfc(text) {
            text.into()
        } else {
            text.nfc().collect::<String>().into()
        };
        check(&name)?;
        Ok(Self(name))
    }

    /// The name of a local file, from its path relative to the share root.
    pub fn from_path(relative: &Path) -> Result<Self, NameError> {
        Self::parse(relative.to_str().ok_or(NameError::NotUtf8)?)
    }

    /// This name below another folder: `prefix/self`.
    pub fn under(&self, prefix: &str) -> Result<Self, NameError> {
        Self::parse(&format!("{prefix}/{self}"))
    }

    /// The name to try when this one is taken: `dir/film.mkv` becomes `dir/film (2).mkv`.
    pub fn numbered(&self, n: u32) -> Result<Self, NameError> {
        let file = self.file_name();
        let parent = &self.0[..self.0.len() - file.len()];
        let (stem, extension) = match file.rfind('.') {
            Some(dot) if dot > 0 && file.len() - dot <= MAX_EXTENSION_LEN => file.split_at(dot),
            _ => (file, ""),
        };
        let tail = format!(" ({n}){extension}");
        Self::parse(&format!(
            "{parent}{}{tail}",
            cut(stem, MAX_COMPONENT_LEN - tail.len())
        ))
    }

    /// The part before the last `/`; empty for a file at the top.
    pub fn folder(&self) -> &str {
        self.0.rsplit_once('/').map_or("", |(folder, _)| folder)
    }

    /// The name as text, for the wire and for comparison. Show it to people through [`escape`].
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name as a relative path.
    pub fn as_path(&self) -> &Path {
        Path::new(&*self.0)
    }

    /// The components, outermost first; never empty.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.0.split('/')
    }

    /// The last component.
    pub fn file_name(&self) -> &str {
        self.0
            .rsplit('/')
            .next()
            .expect("a split has at least one part")
    }
}

impl AsRef<str> for SafeName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SafeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for SafeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", escape(&self.0))
    }
}

/// The rules, on a name in NFC.
fn check(name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    if name.len() > MAX_NAME_LEN {
        return Err(NameError::TooLong);
    }
    if name.starts_with('/') {
        return Err(NameError::Absolute);
    }
    if let Some(bad) = name.chars().find(|&c| is_forbidden(c)) {
        return Err(NameError::Character(bad));
    }
    if name.split('/').count() > MAX_DEPTH {
        return Err(NameError::TooDeep);
    }
    for component in name.split('/') {
        match component {
            "" => return Err(NameError::EmptyComponent),
            "." | ".." => return Err(NameError::DotComponent),
            OWN_FOLDER => return Err(NameError::Reserved),
            _ if component.len() > MAX_COMPONENT_LEN => return Err(NameError::ComponentTooLong),
            _ => {}
        }
    }
    if name.ends_with(PART_SUFFIX) {
        Err(NameError::Reserved)
    } else {
        Ok(())
    }
}

/// Characters no name may have: they act on a terminal, turn text around, or make two names look alike.
fn is_forbidden(c: char) -> bool {
    c == '\\'
        || c.is_control()
        || matches!(c,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' // direction
            | '\u{200b}' | '\u{2060}'..='\u{2065}' | '\u{206a}'..='\u{206f}' | '\u{feff}' | '\u{180e}' // invisible
            | '\u{2028}' | '\u{2029}' // line and paragraph separators
            | '\u{fff9}'..='\u{fffb}' // interlinear annotation
        )
}

/// Characters with honest uses inside names that nobody can see: the joiners of Persian and emoji, soft hyphens, tags.
fn is_unseen(c: char) -> bool {
    matches!(
        c,
        '\u{200c}'
            | '\u{200d}'
            | '\u{ad}'
            | '\u{34f}'
            | '\u{115f}'
            | '\u{1160}'
            | '\u{3164}'
            | '\u{ffa0}'
    ) || matches!(c, '\u{e0000}'..='\u{e0fff}')
}

/// Text made safe for terminals and logs: every control, direction and invisible character as `\u{…}`, on one line.
/// Escaping twice changes nothing.
pub fn escape(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if c != '\\' && (is_forbidden(c) || is_unseen(c)) {
            shown.extend(c.escape_unicode());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// The longest beginning of `text` that has at most `max` bytes.
fn cut(text: &str, max: usize) -> &str {
    let end = (0..=max.min(text.len()))
        .rev()
        .find(|&end| text.is_char_boundary(end));
    &text[..end.expect("0 is a boundary")]
}

/// Puts the path in front of an I/O error and keeps its kind. Says in words what the kernel's words hide.
pub fn with_path(path: &Path, error: impl Into<io::Error>) -> io::Error {
    let error = error.into();
    let path = escape(&path.to_string_lossy());
    match rustix::io::Errno::from_io_error(&error) {
        Some(rustix::io::Errno::LOOP | rustix::io::Errno::XDEV) => io::Error::new(
            error.kind(),
            format!("{path}: a symbolic link, which sprat never follows here"),
        ),
        Some(rustix::io::Errno::NOTDIR) => io::Error::new(
            error.kind(),
            format!("{path}: a file or link is where a folder is needed"),
        ),
        _ => io::Error::new(error.kind(), format!("{path}: {error}")),
    }
}

/// An error of our own finding, with its path in front.
fn refuse(kind: io::ErrorKind, path: &Path, why: &str) -> io::Error {
    io::Error::new(kind, format!("{}: {why}", escape(&path.to_string_lossy())))
}

/// A path that stays meaningful when the working directory changes.
fn absolute(path: &Path) -> io::Result<PathBuf> {
    std::path::absolute(path).map_err(|e| with_path(path, e))
}

#[cfg(test)]
mod tests {
    use std::path::Component;

    use proptest::prelude::*;

    use super::*;

    const FORBIDDEN: &str = "\\\u{61c}\u{200e}\u{200f}\u{202a}\u{202b}\u{202c}\u{202d}\u{202e}\u{2066}\u{2067}\u{2068}\
        \u{2069}\u{200b}\u{2060}\u{2061}\u{2062}\u{2063}\u{2064}\u{206a}\u{206f}\u{feff}\u{180e}\u{2028}\u{2029}\u{fff9}\
        \u{fffb}";

    fn accepted(text: &str) -> SafeName {
        SafeName::parse(text).unwrap_or_else(|e| panic!("{text:?} was refused: {e}"))
    }

    fn refused(text: &str) -> NameError {
        SafeName::parse(text).expect_err(text)
    }

    /// What A-29 and A-30 ask of every accepted name, by another road than `check` takes.
    fn assert_contained(name: &SafeName) {
        let (text, root) = (name.as_str(), Path::new("/root/of/share"));
        let joined = root.join(name.as_path());
        assert!(joined.starts_with(root) && joined != root, "{name:?}");
        assert!(
            name.as_path()
                .components()
                .all(|c| matches!(c, Component::Normal(_))),
            "{name:?}"
        );
        let rebuilt = name
            .as_path()
            .components()
            .map(|c| c.as_os_str().to_str().unwrap())
            .collect::<Vec<_>>()
            .join("/");
        assert_eq!(rebuilt, text, "not canonical");
        assert_eq!(SafeName::parse(text).as_ref(), Ok(name), "not idempotent");
        assert!(text.len() <= MAX_NAME_LEN && name.components().count() <= MAX_DEPTH);
        assert!(
            !text.contains(['\\', '\0', '\n', '\u{1b}', '\u{202e}', '\u{200b}']),
            "{name:?}"
        );
        assert!(
            !escape(text).contains(['\u{200c}', '\u{200d}', '\u{ad}']),
            "{name:?}"
        );
        assert!(
            name.components().all(|c| c != OWN_FOLDER) && !text.ends_with(PART_SUFFIX),
            "{name:?}"
        );
    }

    #[test]
    fn a01_a02_a03_paths_that_lead_elsewhere() {
        for text in [
            ".",
            "..",
            "../x",
            "a/..",
            "a/../../x",
            "a/b/../../../x",
            "./x",
            "a/./b",
            "a/.",
            "../../etc/passwd",
        ] {
            assert_eq!(refused(text), NameError::DotComponent, "{text}");
        }
        for text in ["a//b", "a/", "a/b/", "a//", "a///b"] {
            assert_eq!(refused(text), NameError::EmptyComponent, "{text}");
        }
        for text in ["/", "/etc/passwd", "//host/x", "/../x", "/."] {
            assert_eq!(refused(text), NameError::Absolute, "{text}");
        }
        assert_eq!(refused(""), NameError::Empty);
        for text in ["...", "..a", "a..", ".hidden", "a/.../b", "~", "~root/x"] {
            assert_contained(&accepted(text));
        }
    }

    #[test]
    fn a04_to_a08_hundreds_of_forbidden_characters_in_every_place() {
        let controls = (0..=0x1f_u32).chain(0x7f..=0x9f).filter_map(char::from_u32);
        let mut n_refused = 0;
        for bad in controls.chain(FORBIDDEN.chars()) {
            for text in [
                format!("{bad}"),
                format!("{bad}name"),
                format!("na{bad}me"),
                format!("name{bad}"),
                format!("dir{bad}/name"),
                format!("dir/{bad}/name"),
                format!("e\u{301}{bad}"),
            ] {
                assert_eq!(refused(&text), NameError::Character(bad), "{text:?}");
                assert!(refused(&text).to_string().is_ascii());
                n_refused += 1;
            }
            assert!(bad == '\\' || escape(&bad.to_string()).is_ascii());
        }
        for text in [
            "C:\\x",
            "\\\\srv\\share",
            "..\\..\\x",
            "a\\b",
            "x\u{1b}[2Jy",
            "x\u{1b}]0;title\u{7}",
            "a\r\nb",
            "a\0",
        ] {
            assert!(matches!(refused(text), NameError::Character(_)), "{text:?}");
            n_refused += 1;
        }
        assert!(n_refused >= 400, "only {n_refused} bad names");
    }

    #[test]
    fn a08_joiners_are_accepted_and_shown_escaped() {
        let name = accepted(
            "\u{645}\u{6cc}\u{200c}\u{62e}\u{648}\u{627}\u{647}\u{645}/\u{1f468}\u{200d}\u{1f469}.txt",
        );
        assert_contained(&name);
        let shown = escape(name.as_str());
        assert!(
            shown.contains("\\u{200c}") && shown.contains("\\u{200d}"),
            "{shown}"
        );
        assert!(name.as_str().contains('\u{200d}'), "stored as it is");
        assert_eq!(format!("{name:?}"), format!("\"{shown}\""));
    }

    #[test]
    fn a09_one_name_in_both_unicode_forms() {
        let (composed, decomposed) = (
            accepted("caf\u{e9}/\u{c5}.txt"),
            accepted("cafe\u{301}/A\u{30a}.txt"),
        );
        assert_eq!(composed, decomposed);
        assert_eq!(decomposed.as_str(), "caf\u{e9}/\u{c5}.txt");
        // Forms whose NFC is another character: the rules hold for what comes out. U+212B is the Angstrom sign.
        assert_eq!(accepted("\u{212b}"), accepted("\u{c5}"));
        assert_eq!(
            refused(&"\u{1d15e}".repeat(40)),
            NameError::ComponentTooLong,
            "NFC makes this one longer"
        );
    }

    #[test]
    fn a12_a13_limits() {
        let component = "x".repeat(MAX_COMPONENT_LEN);
        assert_contained(&accepted(&component));
        assert_contained(&accepted(&format!("{}é", "x".repeat(253))));
        for text in [
            format!("{component}x"),
            format!("{}é", "x".repeat(254)),
            format!("a/{component}x/b"),
        ] {
            assert_eq!(refused(&text), NameError::ComponentTooLong, "{text}");
        }
        for len in [1023, 1024, 1025, 1026] {
            let text = ["x".repeat(200).as_str(); 5].join("/") + "/" + &"y".repeat(len - 1005);
            assert_eq!(text.len(), len);
            assert_eq!(SafeName::parse(&text).is_ok(), len <= MAX_NAME_LEN, "{len}");
        }
        assert_contained(&accepted(&["d"; MAX_DEPTH].join("/")));
        assert_eq!(refused(&["d"; MAX_DEPTH + 1].join("/")), NameError::TooDeep);
        assert_eq!(refused(&"x".repeat(1 << 20)), NameError::TooLong);
        assert_eq!(refused(&"/".repeat(1 << 20)), NameError::TooLong);
    }

    #[test]
    fn a14_a16_a17_a18_odd_but_harmless_names_are_kept_literally() {
        for text in [
            "CON",
            "nul.txt",
            "COM1",
            "LPT9",
            "COM\u{b9}",
            "dot.",
            "space ",
            " space",
            "a:b",
            "C:x",
            "-rf",
            "--help",
            "$(id)",
            ";reboot",
            "`x`",
            "%s%n",
            "{}",
            "*",
            "a?b",
            "<script>alert(1)</script>",
            "\"><img src=x>",
            "javascript:x",
            "x{le=\"1\"}",
            "a|b",
            "'",
            "\u{1f4be}.iso",
            "日本語/ファイル",
            "README",
            "readme",
            ".gitignore",
            "x.part.txt",
            "x.PART",
            "a.part/b",
            ".spratx",
            "sprat",
            "\u{fe0f}",
            "\u{fffd}",
        ] {
            let name = accepted(text);
            assert_eq!(name.as_str(), text);
            assert_contained(&name);
        }
    }

    #[test]
    fn a15_names_of_our_own_files() {
        for text in [
            ".sprat",
            ".sprat/lock",
            "a/.sprat/b",
            "a/.sprat",
            "x.part",
            "a/x.part",
            ".part",
            "a.part/b.part",
        ] {
            assert_eq!(refused(text), NameError::Reserved, "{text}");
        }
    }

    #[test]
    fn a19_a20_what_is_not_utf8_is_no_name() {
        use std::{ffi::OsStr, os::unix::ffi::OsStrExt};
        for bytes in [
            &b"\xff"[..],
            b"a/\xc0\xaf..",
            b"\xed\xa0\x80",
            b"ok/\xfe",
            b"\xf8\x88\x80\x80\x80",
        ] {
            assert_eq!(
                SafeName::from_path(Path::new(OsStr::from_bytes(bytes))),
                Err(NameError::NotUtf8)
            );
        }
        assert_eq!(
            SafeName::from_path(Path::new("a/b")).unwrap().as_str(),
            "a/b"
        );
        assert_eq!(
            SafeName::from_path(Path::new("/a")),
            Err(NameError::Absolute)
        );
    }

    #[test]
    fn a31_a32_the_same_name_under_two_roots_and_reasons_in_words() {
        let name = accepted("shots/1.exr");
        assert_eq!(name.under("film").unwrap().as_str(), "film/shots/1.exr");
        assert_ne!(name.under("a"), name.under("b"));
        for prefix in ["..", "", "/", "a/..", ".sprat", "a\\"] {
            assert!(name.under(prefix).is_err(), "{prefix}");
        }
        assert_eq!(
            refused("a\u{202e}b").to_string(),
            "the name has the forbidden character U+202E"
        );
    }

    #[test]
    fn a11_numbered_names_keep_their_ending_and_their_limits() {
        for (text, expected) in [
            ("README", "README (2)"),
            ("a/film.mkv", "a/film (2).mkv"),
            (".profile", ".profile (2)"),
            (
                "v1.a long tail that is no ending",
                "v1.a long tail that is no ending (2)",
            ),
            ("x.tar.gz", "x.tar (2).gz"),
        ] {
            assert_eq!(accepted(text).numbered(2).unwrap().as_str(), expected);
        }
        for text in [
            "é".repeat(127) + "x",
            "é".repeat(125) + ".tiff",
            "x".repeat(255),
        ] {
            let numbered = accepted(&text).numbered(u32::MAX).unwrap();
            assert!(
                numbered.as_str().len() > 250 && numbered.as_str().contains(" (4294967295)"),
                "{numbered}"
            );
        }
    }

    #[test]
    fn names_know_their_parts() {
        let name = accepted("a/b/c.txt");
        assert_eq!(name.components().collect::<Vec<_>>(), ["a", "b", "c.txt"]);
        assert_eq!(
            (name.file_name(), accepted("x").file_name()),
            ("c.txt", "x")
        );
        assert_eq!(
            (format!("{name}"), name.as_ref()),
            ("a/b/c.txt".to_owned(), "a/b/c.txt")
        );
    }

    #[test]
    fn a33_escape_leaves_nothing_that_acts_and_is_idempotent() {
        assert_eq!(
            escape("a\nb\u{1b}[31m\u{202e}\u{feff}c\\é"),
            "a\\u{a}b\\u{1b}[31m\\u{202e}\\u{feff}c\\é"
        );
        assert_eq!(escape("tag\u{e0041}soft\u{ad}"), "tag\\u{e0041}soft\\u{ad}");
    }

    #[test]
    fn errors_carry_the_path_and_keep_their_kind() {
        let error = with_path(
            Path::new("/x/a\nb"),
            io::Error::from(io::ErrorKind::StorageFull),
        );
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(error.to_string().starts_with("/x/a\\u{a}b: "), "{error}");
    }

    /// A million names from parts that meet in attacks, by a fixed generator (xorshift), so that a failure repeats.
    #[test]
    fn a29_a_million_names_stay_inside() {
        const PARTS: [&str; 32] = [
            "/",
            "/",
            "/",
            ".",
            "..",
            "a",
            "b.txt",
            "\\",
            "\0",
            "C:",
            "é",
            "e\u{301}",
            "\u{212b}",
            ".sprat",
            ".part",
            " ",
            "\u{200d}",
            "\u{200b}",
            "\u{202e}",
            "\n",
            "~",
            "%2e%2e",
            "\u{2024}\u{2024}",
            "\u{ff0f}",
            "\u{2215}",
            "\u{ff0e}",
            "CON",
            "-",
            "日",
            "\u{1d15e}",
            "x",
            "\u{fe0f}",
        ];
        let (mut state, mut n_accepted) = (0x9e37_79b9_7f4a_7c15_u64, 0);
        let mut text = String::new();
        for _ in 0..1_000_000 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            text.clear();
            let mut bits = state;
            for _ in 0..1 + state % 7 {
                bits >>= 5;
                text.push_str(PARTS[(bits % 32) as usize]);
            }
            if let Ok(name) = SafeName::parse(&text) {
                assert_contained(&name);
                n_accepted += 1;
            }
        }
        assert!(n_accepted > 50_000, "only {n_accepted} accepted");
    }

    proptest! {
        #[test]
        fn a30_whatever_the_text_what_is_accepted_is_canonical_and_inside(text in any::<String>()) {
            if let Ok(name) = SafeName::parse(&text) {
                assert_contained(&name);
            }
        }

        #[test]
        fn a30_paths_of_tricky_components(
            parts in prop::collection::vec(r"[./\\a-z:~\u{0}-\u{20}\u{80}-\u{a0}\u{300}-\u{303}\u{200b}-\u{200f}]{0,4}", 0..40),
        ) {
            if let Ok(name) = SafeName::parse(&parts.join("/")) {
                assert_contained(&name);
            }
        }

        #[test]
        fn escape_is_idempotent_and_one_line(text in any::<String>()) {
            let shown = escape(&text);
            prop_assert!(!shown.chars().any(char::is_control));
            prop_assert_eq!(escape(&shown), shown);
        }

        #[test]
        fn numbered_names_are_names(text in "[a-zé./]{1,300}", n in any::<u32>()) {
            if let Ok(name) = SafeName::parse(&text) && let Ok(numbered) = name.numbered(n) {
                assert_contained(&numbered);
                prop_assert_ne!(name, numbered);
            }
        }
    }
}
