//! The architecture, held: who imports whom, which rooms are pure, and that `docs/architecture.md` draws the house as it is.
//!
//! Reads `src/` as Rust tokens, so that comments, strings and tests do not count, and resolves every path as far as the room.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// Paths that the code of one file names, `crate::…` and `super::…` made absolute.
struct Source {
    /// `src/model/lcb.rs`.
    file: String,
    /// The lines that say what the file is for.
    head: String,
    paths: BTreeSet<String>,
}

impl Source {
    fn read(path: &Path, module: &[String]) -> Self {
        let text = fs::read_to_string(path).unwrap();
        let tokens: TokenStream = text.parse().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut paths = BTreeSet::new();
        collect(tokens, &mut module.to_vec(), &[], &mut paths);
        let head = text.lines().take_while(|line| line.starts_with("//!")).collect::<Vec<_>>().join("\n");
        let file = path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap().to_string_lossy().into_owned();
        Self { file, head, paths }
    }

    /// Names that it must not name: whole paths, their beginnings, or `*::name` for a last segment anywhere.
    fn violations(&self, forbidden: &[&str]) -> Vec<String> {
        let hit = |path: &str, rule: &str| match rule.strip_prefix("*::") {
            Some(name) => path.split("::").skip(1).any(|segment| segment == name),
            None => path.strip_prefix(rule).is_some_and(|rest| rest.is_empty() || rest.starts_with("::")),
        };
        self.paths
            .iter()
            .flat_map(|path| forbidden.iter().filter(move |rule| hit(path, rule)).map(move |rule| (path, rule)))
            .map(|(path, rule)| format!("{} names {path} (forbidden: {rule})", self.file))
            .collect()
    }
}

/// Adds every path in `tokens`. `module` is where we are; `prefix` what stands before a `::{…}`.
fn collect(tokens: TokenStream, module: &mut Vec<String>, prefix: &[String], paths: &mut BTreeSet<String>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let (mut at, mut test) = (0, false);
    while let Some(token) = tokens.get(at) {
        at += 1;
        match token {
            TokenTree::Group(group) if matches!(tokens.get(at.wrapping_sub(2)), Some(TokenTree::Punct(p)) if p.as_char() == '#') =>
            {
                test |= group.stream().to_string().replace(' ', "") == "cfg(test)";
            }
            TokenTree::Group(group) => {
                collect(group.stream(), module, &[], paths);
                test &= group.delimiter() != Delimiter::Brace;
            }
            TokenTree::Punct(end) if end.as_char() == ';' => test = false,
            TokenTree::Ident(name) if name == "mod" => {
                if let (Some(TokenTree::Ident(inner)), Some(TokenTree::Group(body))) = (tokens.get(at), tokens.get(at + 1)) {
                    if !test {
                        module.push(inner.to_string());
                        collect(body.stream(), module, &[], paths);
                        module.pop();
                    }
                    at += 2;
                }
                test = false;
            }
            TokenTree::Ident(first) => {
                let mut path = prefix.to_vec();
                path.push(first.to_string());
                let mut group = None;
                while is_colons(&tokens, at) {
                    match tokens.get(at + 2) {
                        Some(TokenTree::Ident(next)) => path.push(next.to_string()),
                        Some(TokenTree::Punct(glob)) if glob.as_char() == '*' => path.push("*".into()),
                        Some(TokenTree::Group(more)) if more.delimiter() == Delimiter::Brace => {
                            group = Some(more.stream());
                            at += 3;
                            break;
                        }
                        // Generics: `collect::<Vec<_>>`.
                        _ => break,
                    }
                    at += 3;
                }
                match group {
                    Some(group) => collect(group, module, &path, paths),
                    None => {
                        paths.insert(absolute(path, module).join("::"));
                    }
                }
            }
            _ => {}
        }
    }
}

fn is_colons(tokens: &[TokenTree], at: usize) -> bool {
    let colon = |at| matches!(tokens.get(at), Some(TokenTree::Punct(p)) if p.as_char() == ':');
    colon(at) && colon(at + 1)
}

/// `super::super::x` in `crate::room::file` is `crate::x`.
fn absolute(path: Vec<String>, module: &[String]) -> Vec<String> {
    let up = path.iter().take_while(|segment| *segment == "super").count();
    let from_self = path.first().is_some_and(|segment| segment == "self");
    if up == 0 && !from_self {
        return path;
    }
    let above = module.get(..module.len().saturating_sub(up)).unwrap_or_default();
    ["crate".to_owned()].iter().chain(above).chain(path.iter().skip(up.max(1))).cloned().collect()
}

/// Every room and its files; files of tests are left out.
fn rooms() -> BTreeMap<String, Vec<Source>> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut rooms = BTreeMap::new();
    for entry in fs::read_dir(src).unwrap() {
        let entry = entry.unwrap();
        if entry.path().is_dir() {
            let room = entry.file_name().into_string().unwrap();
            let mut sources = vec![];
            walk(&entry.path(), &mut vec![room.clone()], &mut sources);
            rooms.insert(room, sources);
        }
    }
    assert!(rooms.len() >= 10 && rooms.values().all(|sources| !sources.is_empty()), "src/ has moved: {:?}", rooms.keys());
    rooms
}

fn walk(folder: &Path, module: &mut Vec<String>, sources: &mut Vec<Source>) {
    let mut entries: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        let stem = path.file_stem().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            module.push(stem);
            walk(&path, module, sources);
            module.pop();
        } else if path.extension().is_some_and(|extension| extension == "rs") && stem != "tests" && !stem.ends_with("_tests") {
            let own = stem != "mod";
            if own {
                module.push(stem);
            }
            sources.push(Source::read(&path, module));
            if own {
                module.pop();
            }
        }
    }
}

/// `(importer, imported)`.
fn edges(rooms: &BTreeMap<String, Vec<Source>>) -> BTreeSet<(String, String)> {
    let mut edges = BTreeSet::new();
    for (room, sources) in rooms {
        for path in sources.iter().flat_map(|source| &source.paths) {
            let Some(rest) = path.strip_prefix("crate::") else { continue };
            let other = rest.split("::").next().unwrap_or_default();
            assert_ne!(other, "*", "a file of {room} imports all of the crate");
            if other != room && rooms.contains_key(other) {
                edges.insert((room.clone(), other.to_owned()));
            }
        }
    }
    edges
}

/// The arrows of the first mermaid flowchart of a page, `a --> b`.
fn drawn(page: &str) -> BTreeSet<(String, String)> {
    let start = page.find("```mermaid\nflowchart").expect("no flowchart in docs/architecture.md");
    let (_, picture) = page.split_at(start);
    let picture = picture.trim_start_matches("```mermaid\n");
    let picture = picture.split("```").next().unwrap();
    let name = |side: &str| side.trim().split(['[', '(']).next().unwrap_or_default().trim().to_owned();
    picture.lines().filter_map(|line| line.split_once("-->")).map(|(from, to)| (name(from), name(to))).collect()
}

/// What may not be known where: `(rooms, names, why)`.
const RULES: &[(&[&str], &[&str], &str)] = &[
    (
        &["model"],
        &[
            "kube",
            "k8s_openapi",
            "jiff",
            "tokio",
            "nix",
            "axum",
            "clap",
            "std::fs",
            "std::net",
            "std::process",
            "std::env",
            "std::thread",
            "std::io",
            "*::Instant",
            "*::SystemTime",
            "*::Timestamp",
            "rand::rng",
        ],
        "the model is pure: time and randomness are arguments",
    ),
    (
        &["collector", "dryrun", "qemu"],
        &[
            "kube",
            "k8s_openapi",
            "axum",
            "crate::api",
            "crate::decision",
            "crate::manager",
            "crate::webhook",
            "crate::agent",
            "crate::cli",
        ],
        "they know hypervisors, not Kubernetes",
    ),
    (
        &["api", "decision", "manager", "webhook"],
        &["crate::qemu", "crate::collector", "crate::dryrun", "crate::agent", "nix"],
        "they know Kubernetes, not hypervisors",
    ),
    (
        &["decision"],
        &["kube", "tokio", "std::fs", "std::net", "*::Instant", "*::SystemTime", "*::Client", "*::Api", "*::now"],
        "a decision is pure: what it depends on is its input",
    ),
    (&["api"], &["tokio", "std::fs", "std::net", "*::Client", "*::Api"], "objects do no I/O"),
    (
        &["runtime"],
        &["crate::api", "crate::model", "crate::manager", "crate::agent", "crate::webhook"],
        "nothing in it knows migrations",
    ),
];

#[test]
fn rooms_know_only_what_they_may() {
    let rooms = rooms();
    let mut wrong: Vec<String> = vec![];
    for (who, forbidden, why) in RULES {
        for source in who.iter().flat_map(|room| rooms.get(*room).unwrap_or_else(|| panic!("no room {room}"))) {
            wrong.extend(source.violations(forbidden).into_iter().map(|what| format!("{what}: {why}")));
        }
    }
    for (from, to) in edges(&rooms) {
        if from == "model" {
            wrong.push(format!("model imports {to}: it imports none of the others"));
        }
    }
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

#[test]
fn what_calls_itself_pure_is() {
    let calls_itself = |head: &str| ["Pure.", "Pure:", ": pure"].iter().any(|word| head.contains(word));
    let rooms = rooms();
    let pure: Vec<&Source> = rooms.values().flatten().filter(|source| calls_itself(&source.head)).collect();
    assert!(pure.len() >= 5, "where have the pure files gone? {:?}", pure.iter().map(|source| &source.file).collect::<Vec<_>>());
    let forbidden =
        ["std::fs", "std::net", "std::thread", "tokio::fs", "tokio::net", "tokio::spawn", "*::Client", "*::Api", "*::now"];
    let wrong: Vec<String> = pure.iter().flat_map(|source| source.violations(&forbidden)).collect();
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

#[test]
fn the_house_is_drawn_as_it_is() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/architecture.md");
    let (drawn, built) = (drawn(&fs::read_to_string(page).unwrap()), edges(&rooms()));
    let show = |edges: Vec<&(String, String)>| {
        edges.iter().map(|(from, to)| format!("    {from} --> {to}\n")).collect::<Vec<_>>().concat()
    };
    let (absent, stale) = (show(built.difference(&drawn).collect()), show(drawn.difference(&built).collect()));
    assert!(
        absent.is_empty() && stale.is_empty(),
        "the flowchart in docs/architecture.md is not the house.\nDraw:\n{absent}Take away:\n{stale}"
    );
}

#[test]
fn the_reader_reads() {
    let text = r#"
        //! crate::agent in a comment does not count.
        use crate::{model::{self, units::Bytes}, qemu::*};
        use super::{super::webhook::x, sibling};
        const TEXT: &str = "crate::manager";
        fn f() { tracing::info!(time = ?crate::runtime::spread(0.0, 1.0)); Vec::<std::fs::File>::new(); }
        #[cfg(test)] mod tests { use crate::cli; }
        mod inner { use super::super::super::api; }
    "#;
    let mut paths = BTreeSet::new();
    collect(text.parse().unwrap(), &mut vec!["room".into(), "file".into()], &[], &mut paths);
    for path in [
        "crate::model::self",
        "crate::model::units::Bytes",
        "crate::qemu::*",
        "crate::webhook::x",
        "crate::room::sibling",
        "crate::runtime::spread",
        "std::fs::File",
        "crate::api",
    ] {
        assert!(paths.contains(path), "{path} in {paths:#?}");
    }
    for room in ["agent", "manager", "cli"] {
        assert!(!paths.iter().any(|path| path.starts_with(&format!("crate::{room}"))), "{room} in {paths:#?}");
    }
}
