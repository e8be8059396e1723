//! Records what was built: commit, compiler, target. Embeds the device sources under `cuda/`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let result = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8(result.stdout).ok()?.trim().to_string();
    (result.status.success() && !text.is_empty()).then_some(text)
}

/// Paths of `.cu` and `.cuh` files under `directory`, relative to it, with `/` between parts.
fn device_sources(directory: &Path, prefix: &str, names: &mut Vec<String>) {
    let entries = fs::read_dir(directory).unwrap_or_else(|e| panic!("cannot read {}: {e}", directory.display()));
    for entry in entries {
        let path = entry.expect("a directory entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).expect("an UTF-8 file name").to_string();
        if path.is_dir() {
            device_sources(&path, &format!("{prefix}{name}/"), names);
        } else if name.ends_with(".cuh") || name.ends_with(".cu") {
            names.push(format!("{prefix}{name}"));
        }
    }
}

/// Writes `FILES`, the table of embedded sources, for `src/cuda.rs`.
fn embed_device_sources() {
    let root = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR").expect("set by cargo")).join("../../cuda");
    let mut names = Vec::new();
    device_sources(&root, "", &mut names);
    names.sort();
    let mut table = String::from("static FILES: &[(&str, &str)] = &[\n");
    for name in &names {
        let path = root.join(name);
        println!("cargo::rerun-if-changed={}", path.display());
        table += &format!("    ({name:?}, include_str!({:?})),\n", path.display().to_string());
    }
    table += "];\n";
    let out = PathBuf::from(std::env::var("OUT_DIR").expect("set by cargo")).join("cuda_files.rs");
    fs::write(&out, table).unwrap_or_else(|e| panic!("cannot write {}: {e}", out.display()));
    println!("cargo::rerun-if-changed={}", root.display()); // new and removed files
}

fn main() {
    embed_device_sources();
    let commit = output("git", &["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".into());
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    println!("cargo::rustc-env=TILEWISE_COMMIT={commit}");
    println!("cargo::rustc-env=TILEWISE_RUSTC={}", output(&rustc, &["--version"]).unwrap_or_default());
    println!("cargo::rustc-env=TILEWISE_TARGET={}", std::env::var("TARGET").unwrap_or_default());
    println!("cargo::rustc-env=TILEWISE_PROFILE={}", std::env::var("PROFILE").unwrap_or_default());
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=../../.git/logs/HEAD");
}
