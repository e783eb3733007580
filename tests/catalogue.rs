//! Every error that the programs can print, found in the source, against `contrib/doc/TROUBLESHOOTING.md`: each has
//! an entry there, each entry has an error, and each says cause, effect and action.
//!
//! An error is made by `Error::new(exit, what, why, effect, action)`; its first line, `what`, is a literal there, or
//! in the calls of the helper that it stands in. What the log says is made by `tracing::error!` and `tracing::warn!`.
//! A `…` in the document stands for what is filled in.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Words of a piece of Rust source: string literals and everything else, without comments.
#[derive(Debug, Clone, PartialEq)]
enum Word {
    Text(String),
    Code(char),
}

fn words(source: &str) -> Vec<Word> {
    let chars: Vec<char> = source.chars().collect();
    let (mut all, mut i) = (Vec::new(), 0);
    while i < chars.len() {
        match chars[i] {
            '/' if chars.get(i + 1) == Some(&'/') => {
                i += chars[i..].iter().position(|c| *c == '\n').unwrap_or(chars.len() - i);
            }
            // A character, not a lifetime.
            '\'' if chars.get(i + 1) == Some(&'\\') => i += 3,
            '\'' if chars.get(i + 2) == Some(&'\'') => i += 2,
            '"' => {
                let mut text = String::new();
                i += 1;
                while chars[i] != '"' {
                    if chars[i] != '\\' {
                        text.push(chars[i]);
                    } else if chars[i + 1] == '\n' {
                        // A line goes on without its indentation.
                        i += 1;
                        while chars[i + 1].is_whitespace() {
                            i += 1;
                        }
                    } else {
                        i += 1;
                        text.push(if chars[i] == 'n' { '\n' } else { chars[i] });
                    }
                    i += 1;
                }
                all.push(Word::Text(text));
            }
            c => all.push(Word::Code(c)),
        }
        i += 1;
    }
    all
}

fn code(words: &[Word]) -> String {
    words.iter().map(|w| if let Word::Code(c) = w { *c } else { '"' }).collect()
}

/// The arguments of the call whose opening parenthesis is before `from`.
fn arguments(words: &[Word], from: usize) -> Vec<Vec<Word>> {
    let (mut depth, mut all) = (0, vec![Vec::new()]);
    for word in &words[from..] {
        match word {
            Word::Code(')' | ']' | '}') if depth == 0 => break,
            Word::Code(',') if depth == 0 => {
                all.push(Vec::new());
                continue;
            }
            Word::Code('(' | '[' | '{') => depth += 1,
            Word::Code(')' | ']' | '}') => depth -= 1,
            _ => {}
        }
        all.last_mut().unwrap().push(word.clone());
    }
    all.retain(|a| !code(a).trim().is_empty());
    all
}

/// What a reader sees of a literal: `…` for what is filled in.
fn shown(literal: &str) -> String {
    let mut text = String::new();
    let mut depth = 0;
    for c in literal.chars() {
        match c {
            '{' => depth += 1,
            '}' => {
                depth -= 1;
                text.push('…');
            }
            c if depth == 0 => text.push(c),
            _ => {}
        }
    }
    text
}

fn literals(argument: &[Word]) -> Vec<String> {
    let text = |w: &Word| if let Word::Text(t) = w { Some(shown(t)) } else { None };
    argument.iter().filter_map(text).filter(|t| t.chars().any(char::is_alphabetic)).collect()
}

/// Places after `NAME(`, where NAME is not the end of a longer name.
fn calls(code: &str, name: &str) -> Vec<usize> {
    let chars: Vec<char> = code.chars().collect();
    let wanted: Vec<char> = format!("{name}(").chars().collect();
    let starts = (0..chars.len()).filter(|i| chars[*i..].starts_with(&wanted));
    let whole = starts.filter(|i| *i == 0 || !(chars[i - 1].is_alphanumeric() || chars[i - 1] == '_'));
    whole.filter(|i| !chars[..*i].ends_with(&['f', 'n', ' '])).map(|i| i + wanted.len()).collect()
}

/// The function that `at` stands in: its name and its parameters.
fn function_at(code: &str, at: usize) -> Option<(String, Vec<String>)> {
    let before: String = code.chars().take(at).collect();
    let start = before.rfind("fn ")? + 3;
    let head = &before[start..];
    let name: String = head.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    let open = head.find('(')? + 1;
    let list: String = head[open..].chars().take_while(|c| *c != ')').collect();
    let names =
        list.split(',').filter_map(|p| p.split_once(':')).map(|(n, _)| n.trim().trim_start_matches('&').to_owned());
    Some((name, names.filter(|n| n != "self").collect()))
}

struct Source {
    name: String,
    words: Vec<Word>,
    code: String,
}

fn sources() -> Vec<Source> {
    fn walk(dir: &Path, all: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, all);
            } else if path.extension().is_some_and(|e| e == "rs") {
                all.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = Vec::new();
    walk(&root.join("src"), &mut paths);
    paths.sort();
    let of = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).unwrap();
        let product = text.split("#[cfg(test)]").next().unwrap_or_default();
        source(&path.strip_prefix(root).unwrap().to_string_lossy(), product)
    };
    paths.into_iter().filter(|p| !p.ends_with("dispatch_tests.rs") && !p.ends_with("testing.rs")).map(of).collect()
}

fn source(name: &str, text: &str) -> Source {
    let words = words(text);
    Source { name: name.into(), code: code(&words), words }
}

/// First lines of all errors, with the files that make them; and what is wrong with some.
fn errors(sources: &[Source]) -> (BTreeMap<String, BTreeSet<String>>, Vec<String>) {
    let (mut found, mut wrong) = (BTreeMap::<String, BTreeSet<String>>::new(), Vec::new());
    for source in sources {
        for at in calls(&source.code, "Error::new") {
            let arguments = arguments(&source.words, at);
            if arguments.len() != 5 {
                // io::Error::new has two.
                if arguments.len() != 2 {
                    wrong.push(format!("{}: an error with {} parts", source.name, arguments.len()));
                }
                continue;
            }
            for (part, name) in arguments.iter().zip(["exit", "what", "why", "effect", "action"]).skip(1) {
                if code(part).trim() == "\"" && literals(part).is_empty() {
                    wrong.push(format!("{}: an error without {name}: {part:?}", source.name));
                }
            }
            let mut whats = literals(&arguments[1]);
            if whats.is_empty() {
                // A variable, or a variable in a literal that is nothing but variables.
                let inside =
                    arguments[1].iter().find_map(|w| if let Word::Text(t) = w { Some(t.clone()) } else { None });
                let plain = code(&arguments[1]);
                let (variable, after) = match &inside {
                    Some(t) => t.strip_prefix('{').and_then(|t| t.split_once('}')).unwrap_or_default(),
                    None => (plain.as_str(), ""),
                };
                let callers = of_callers(sources, source, at, variable.trim());
                whats = callers.into_iter().map(|w| format!("{w}{}", shown(after))).collect();
            }
            if whats.is_empty() {
                wrong.push(format!("{}: no literal says what failed: {}", source.name, code(&arguments[1]).trim()));
            }
            for what in whats {
                found.entry(what).or_default().insert(source.name.clone());
            }
        }
    }
    (found, wrong)
}

/// `what` comes from a variable of the function, or from its callers.
fn of_callers(sources: &[Source], source: &Source, at: usize, argument: &str) -> Vec<String> {
    let variable: String = argument.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    let before: Vec<char> = source.code.chars().take(at).collect();
    let before: String = before.into_iter().collect();
    let Some((function, parameters)) = function_at(&source.code, at) else { return Vec::new() };
    if let Some(start) = before.rfind(&format!("let {variable} = ")) {
        let from = before[..start].chars().count();
        let end = from + source.code.chars().skip(from).position(|c| c == ';').unwrap_or(0);
        return literals(&source.words[from..end]);
    }
    let Some(index) = parameters.iter().position(|p| *p == variable) else { return Vec::new() };
    let elsewhere = |s: &&Source| s.name == source.name || !calls(&s.code, &format!("::{function}")).is_empty();
    let near = sources.iter().filter(|s| s.name == source.name || (elsewhere(s) && function != "new"));
    near.flat_map(|s| {
        calls(&s.code, &function).into_iter().filter_map(|at| arguments(&s.words, at).get(index).map(|a| literals(a)))
    })
    .flatten()
    .collect()
}

/// What the log says at the levels error and warn.
fn log_lines(sources: &[Source]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for source in sources {
        for name in ["error!", "warn!"] {
            for at in calls(&source.code, name) {
                let arguments = arguments(&source.words, at);
                // Fields are `name = value`; the message is the argument that begins with a literal.
                let message = arguments.iter().find(|a| code(a).trim_start().starts_with('"'));
                found.extend(message.into_iter().flat_map(|m| literals(m)).take(1));
            }
        }
    }
    found
}

/// Entries of the document: `### ` and the message in back quotes, then its text.
fn entries(document: &str) -> BTreeMap<String, String> {
    let parts = document.split("\n### `").skip(1);
    parts
        .filter_map(|p| p.split_once("`\n"))
        .map(|(m, text)| (m.to_owned(), text.split("\n## ").next().unwrap_or_default().to_owned()))
        .collect()
}

fn document() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/doc/TROUBLESHOOTING.md")).unwrap()
}

/// What does not fit together.
fn faults(messages: &BTreeSet<String>, document: &str) -> Vec<String> {
    let entries = entries(document);
    let mut wrong: Vec<_> =
        messages.iter().filter(|m| !entries.contains_key(*m)).map(|m| format!("no entry for: ### `{m}`")).collect();
    for (message, text) in &entries {
        if !messages.contains(message) {
            wrong.push(format!("an entry for what nothing prints: {message}"));
        }
        for part in ["Cause:", "Effect:", "Action:"] {
            if !text.contains(part) {
                wrong.push(format!("`{message}` has no {part}"));
            }
        }
    }
    wrong
}

#[test]
fn every_message_is_explained_and_every_explanation_has_a_message() {
    let sources = sources();
    let (errors, mut wrong) = errors(&sources);
    let log = log_lines(&sources);
    assert!(errors.len() > 25 && log.len() > 15, "found: {} errors, {} lines of the log", errors.len(), log.len());
    let all: BTreeSet<String> = errors.into_keys().chain(log).collect();
    wrong.extend(faults(&all, &document()));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_checker_can_fail() {
    let text = "fn bad(what: &str) -> Error { Error::new(Exit::System, what, e, \"effect\", \"do\") }\n\
                fn f() { bad(\"cannot a\"); bad(&format!(\"cannot {b} it\")) } // bad(\"no\")\n\
                fn g() { tracing::warn!(path = %p, \"went {} wrong\", 1); Error::new(Exit::System, \"x y\", \"\", \"e\", \"a\") }";
    let sources = [source("a.rs", text)];
    let (errors, wrong) = errors(&sources);
    assert_eq!(errors.into_keys().collect::<Vec<_>>(), ["cannot a", "cannot … it", "x y"]);
    assert_eq!(wrong.len(), 1, "an empty cause: {wrong:?}");
    assert_eq!(log_lines(&sources).into_iter().collect::<Vec<_>>(), ["went … wrong"]);
    let messages = BTreeSet::from(["cannot a".to_owned(), "x y".to_owned()]);
    let document = "# T\n\n### `cannot a`\nCause: c\nEffect: e\n\n### `old`\nCause: Effect: Action:\n";
    let wrong = faults(&messages, document);
    assert_eq!(wrong.len(), 3, "no entry, no action, no message: {wrong:?}");
}
