//! Records what was built: commit, compiler, target.

use std::process::Command;

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let result = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8(result.stdout).ok()?.trim().to_string();
    (result.status.success() && !text.is_empty()).then_some(text)
}

fn main() {
    let commit = output("git", &["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".into());
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    println!("cargo::rustc-env=TILEWISE_COMMIT={commit}");
    println!("cargo::rustc-env=TILEWISE_RUSTC={}", output(&rustc, &["--version"]).unwrap_or_default());
    println!("cargo::rustc-env=TILEWISE_TARGET={}", std::env::var("TARGET").unwrap_or_default());
    println!("cargo::rustc-env=TILEWISE_PROFILE={}", std::env::var("PROFILE").unwrap_or_default());
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=../../.git/HEAD");
}
