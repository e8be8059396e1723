//! Device sources: one text per kernel, `#include "..."` resolved, each header once, in the order of first use.
//!
//! A pure function over a way to read files: it knows neither where sources come from nor what compiles them. It
//! follows exactly one style, an `#include "name"` on its own line outside `#if`, and refuses every other: a text that
//! silently lacks a header, or that has one under a condition, would compile to something else than its file.
//! `#include <name>` is the toolkit's and stays. `#line` markers make compiler messages name the real files.

use std::fmt::{self, Write};

/// A flattened kernel, and the files that went into it in the order of their first use.
pub struct Flat {
    /// What a compiler gets.
    pub text: String,
    /// Name and text of each file.
    pub files: Vec<(String, String)>,
}

/// Why a kernel cannot be flattened. `chain` lists the files from the entry to the place at fault.
#[derive(Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the variants' comments name the fields
pub enum FlattenError {
    /// No file of that name: the last of `chain`, sought under the names `looked_for`.
    Missing { chain: Vec<String>, looked_for: Vec<String> },
    /// The last of `chain` stands in it twice.
    Cycle { chain: Vec<String> },
    /// An `#include` in another style, as `text` in `line` of the last of `chain`.
    Unfollowed { chain: Vec<String>, line: usize, text: String },
    /// An `#include` between `#if` and `#endif`, as `text` in `line` of the last of `chain`.
    Conditional { chain: Vec<String>, line: usize, text: String },
}

impl fmt::Display for FlattenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { chain, looked_for } => {
                write!(f, "{}, and there is no file {}", chain.join(" -> "), looked_for.join(" or "))
            }
            Self::Cycle { chain } => write!(f, "a header that includes itself: {}", chain.join(" -> ")),
            Self::Unfollowed { chain, line, text } => {
                write!(f, "{:?} in line {line} of {}, which cannot be followed", text, chain.join(" -> "))
            }
            Self::Conditional { chain, line, text } => {
                write!(f, "{:?} under a condition, in line {line} of {}", text, chain.join(" -> "))
            }
        }
    }
}

/// Flattens `entry` and appends `stub`. `read` gives the text of a file by its path under `cuda/`, or `None`.
///
/// # Errors
/// See [`FlattenError`].
pub fn flatten(entry: &str, stub: &str, read: &dyn Fn(&str) -> Option<String>) -> Result<Flat, FlattenError> {
    let mut work = Work { read, open: Vec::new(), flat: Flat { text: String::new(), files: Vec::new() } };
    match read(entry) {
        Some(text) => work.file(entry.to_string(), text)?,
        None => return Err(FlattenError::Missing { chain: vec![entry.into()], looked_for: vec![entry.into()] }),
    }
    work.mark(1, "stub");
    work.flat.text.push_str(stub);
    if !stub.ends_with('\n') {
        work.flat.text.push('\n');
    }
    Ok(work.flat)
}

struct Work<'a> {
    read: &'a dyn Fn(&str) -> Option<String>,
    open: Vec<String>,
    flat: Flat,
}

impl Work<'_> {
    fn mark(&mut self, line: usize, name: &str) {
        writeln!(self.flat.text, "#line {line} \"{name}\"").expect("writing to a String cannot fail");
    }

    fn file(&mut self, name: String, text: String) -> Result<(), FlattenError> {
        self.flat.files.push((name.clone(), text.clone()));
        self.open.push(name.clone());
        self.mark(1, &name);
        let mut conditions = 0usize;
        for (index, line) in text.lines().enumerate() {
            let directive = line.trim_start().strip_prefix('#').map(str::trim_start).unwrap_or("");
            let word: String = directive.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
            match word.as_str() {
                // Each file appears once by construction; the directive would only draw a warning.
                "pragma" if directive["pragma".len()..].trim() == "once" => self.flat.text.push('\n'),
                "include" => match quoted(directive["include".len()..].trim_start()) {
                    Include::Ours(_) if conditions > 0 => {
                        let text = line.trim().to_string();
                        return Err(FlattenError::Conditional { chain: self.open.clone(), line: index + 1, text });
                    }
                    Include::Ours(wanted) => {
                        self.include(wanted)?;
                        self.mark(index + 2, &name);
                    }
                    Include::Toolkit => self.line(line),
                    Include::Other => {
                        let text = line.trim().to_string();
                        return Err(FlattenError::Unfollowed { chain: self.open.clone(), line: index + 1, text });
                    }
                },
                "if" | "ifdef" | "ifndef" => {
                    conditions += 1;
                    self.line(line);
                }
                "endif" => {
                    conditions = conditions.saturating_sub(1);
                    self.line(line);
                }
                _ => self.line(line),
            }
        }
        self.open.pop();
        Ok(())
    }

    fn line(&mut self, line: &str) {
        self.flat.text.push_str(line);
        self.flat.text.push('\n');
    }

    fn include(&mut self, wanted: &str) -> Result<(), FlattenError> {
        let here = self.open.last().map_or("", |file| file.rsplit_once('/').map_or("", |(directory, _)| directory));
        let mut candidates: Vec<String> = [join(here, wanted), join("", wanted)].into_iter().flatten().collect();
        candidates.dedup();
        for candidate in &candidates {
            if self.open.contains(candidate) {
                return Err(FlattenError::Cycle { chain: self.chain(candidate) });
            }
            if self.flat.files.iter().any(|(name, _)| name == candidate) {
                return Ok(());
            }
            if let Some(text) = (self.read)(candidate) {
                return self.file(candidate.clone(), text);
            }
        }
        Err(FlattenError::Missing { chain: self.chain(wanted), looked_for: candidates })
    }

    fn chain(&self, last: &str) -> Vec<String> {
        self.open.iter().cloned().chain([last.to_string()]).collect()
    }
}

enum Include<'a> {
    Ours(&'a str),
    Toolkit,
    Other,
}

fn quoted(rest: &str) -> Include<'_> {
    if rest.starts_with('<') {
        return Include::Toolkit;
    }
    let Some((name, after)) = rest.strip_prefix('"').and_then(|rest| rest.split_once('"')) else {
        return Include::Other;
    };
    let after = after.trim();
    if after.is_empty() || after.starts_with("//") { Include::Ours(name) } else { Include::Other }
}

/// `directory/name` with `.` and `..` resolved; `None` where that leaves `cuda/`.
fn join(directory: &str, name: &str) -> Option<String> {
    if name.starts_with('/') {
        return None;
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in directory.split('/').chain(name.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(files: &[(&str, &str)], entry: &str, stub: &str) -> Result<Flat, FlattenError> {
        flatten(entry, stub, &|name| files.iter().find(|(file, _)| *file == name).map(|(_, text)| text.to_string()))
    }

    fn names(flat: &Flat) -> Vec<&str> {
        flat.files.iter().map(|(name, _)| name.as_str()).collect()
    }

    #[test]
    fn headers_come_once_and_lines_keep_their_numbers() {
        let files = [
            ("room.cuh", "#pragma once\n#include \"common/a.cuh\"\n#include \"common/b.cuh\"\nint room;\n"),
            ("common/a.cuh", "#pragma once\n#include \"b.cuh\"  // the neighbour\nint a;\n"),
            ("common/b.cuh", "int b;"),
        ];
        let flat = run(&files, "room.cuh", "STUB").unwrap();
        let expected = "#line 1 \"room.cuh\"\n\n#line 1 \"common/a.cuh\"\n\n#line 1 \"common/b.cuh\"\nint b;\n\
                        #line 3 \"common/a.cuh\"\nint a;\n#line 3 \"room.cuh\"\n#line 4 \"room.cuh\"\nint room;\n\
                        #line 1 \"stub\"\nSTUB\n";
        assert_eq!(flat.text, expected);
        assert_eq!(names(&flat), ["room.cuh", "common/a.cuh", "common/b.cuh"]);
    }

    #[test]
    fn a_name_is_sought_beside_its_file_and_then_from_the_root() {
        let files = [
            ("common/a.cuh", "#include \"types.cuh\"\n#include \"ptx/x.cuh\"\n#include \"../top.cuh\"\n"),
            ("common/types.cuh", "beside"),
            ("types.cuh", "root"),
            ("ptx/x.cuh", ""),
            ("top.cuh", ""),
        ];
        let flat = run(&files, "common/a.cuh", "").unwrap();
        assert_eq!(names(&flat), ["common/a.cuh", "common/types.cuh", "ptx/x.cuh", "top.cuh"]);
    }

    #[test]
    fn toolkit_headers_stay() {
        let flat = run(&[("a.cuh", "# include <cuda_fp16.h>\n")], "a.cuh", "").unwrap();
        assert!(flat.text.contains("# include <cuda_fp16.h>\n"));
    }

    #[test]
    fn a_cycle_names_the_chain() {
        let files = [("a.cuh", "#include \"b.cuh\"\n"), ("b.cuh", "#include \"a.cuh\"\n")];
        let error = run(&files, "a.cuh", "").err().unwrap();
        assert_eq!(error.to_string(), "a header that includes itself: a.cuh -> b.cuh -> a.cuh");
    }

    #[test]
    fn a_missing_file_names_the_chain_and_the_places() {
        let files = [("a.cuh", "#include \"common/b.cuh\"\n"), ("common/b.cuh", "\n#include \"c.cuh\"\n")];
        let error = run(&files, "a.cuh", "").err().unwrap();
        assert_eq!(error.to_string(), "a.cuh -> common/b.cuh -> c.cuh, and there is no file common/c.cuh or c.cuh");
        let error = run(&files, "nothing.cuh", "").err().unwrap();
        assert_eq!(error.to_string(), "nothing.cuh, and there is no file nothing.cuh");
    }

    #[test]
    fn nothing_outside_the_tree_is_read() {
        for name in ["../secret", "/etc/secret", "common/../../secret"] {
            let text = format!("#include \"{name}\"\n");
            let flattened = flatten("a.cuh", "", &|file| {
                assert_eq!(file, "a.cuh", "asked for {file}");
                Some(text.clone())
            });
            assert!(matches!(flattened, Err(FlattenError::Missing { .. })), "{name}");
        }
    }

    #[test]
    fn other_styles_are_refused() {
        for line in ["#include HEADER", "#include \"b.cuh\" int x;", "#include \"b.cuh", "#include"] {
            let error = run(&[("a.cuh", &format!("\n{line}\n")), ("b.cuh", "")], "a.cuh", "").err().unwrap();
            let expected = FlattenError::Unfollowed { chain: vec!["a.cuh".into()], line: 2, text: line.into() };
            assert_eq!(error, expected);
        }
    }

    #[test]
    fn a_header_under_a_condition_is_refused() {
        let files = [("a.cuh", "#if X\n#include \"b.cuh\"\n#endif\n"), ("b.cuh", "")];
        let error = run(&files, "a.cuh", "").err().unwrap();
        assert_eq!(error.to_string(), "\"#include \\\"b.cuh\\\"\" under a condition, in line 2 of a.cuh");
        let files = [("a.cuh", "#ifdef X\n#endif\n#include \"b.cuh\"\n"), ("b.cuh", "")];
        assert!(run(&files, "a.cuh", "").is_ok());
    }
}
