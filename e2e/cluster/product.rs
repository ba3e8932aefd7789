//! The product's own binary as a child process of a test: `migvisor agent`, `migvisor controller`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use super::{ControlPlane, Process};
use crate::process;

/// The binary beside the running test or demo: `target/<profile>/migvisor`. An error if it was not built.
pub fn binary() -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot tell where this program lies")?;
    // A test lies in <profile>/deps, the demo in <profile>.
    let profile = own
        .ancestors()
        .skip(1)
        .find(|folder| folder.file_name().is_some_and(|name| name != "deps" && name != "examples"))
        .context("this program lies in no target directory")?;
    let binary = profile.join("migvisor");
    if !binary.is_file() {
        bail!("{} is not built: run `cargo build` first (`make test` and `make demo` do)", binary.display());
    }
    Ok(binary)
}

impl ControlPlane {
    /// Starts `migvisor ARGS` as the administrator, with its log in this control plane's directory. `environment` comes last
    /// and may set another `KUBECONFIG` (see [`ControlPlane::kubeconfig_of`]) or `RUST_LOG`.
    pub fn product(&self, name: &str, args: &[&str], environment: &[(&str, &str)]) -> Result<Process> {
        let mut command = process::dying_with_us(binary()?);
        command
            .args(args)
            .env("KUBECONFIG", self.kubeconfig())
            .env("RUST_LOG", "info")
            .env("RUST_BACKTRACE", "1")
            .envs(environment.iter().copied());
        let log = self.directory().join(format!("{}.log", self.unique(name)));
        Process::start(name, command, log)
    }
}
