//! The real kubectl, and manifests that the API server has to accept or refuse.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Namespace;
use kube::{Api, api::PostParams};
use serde_json::json;
use tokio::io::AsyncWriteExt;

use super::ControlPlane;
use crate::process;

/// A kubectl that talks for longer than this hangs, unless it was said to take longer.
const DEADLINE: Duration = Duration::from_secs(60);

/// A kubectl and the cluster that it talks to.
#[derive(Debug, Clone)]
pub struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
    cache: PathBuf,
}

/// What a kubectl said.
#[derive(Debug, Clone)]
pub struct Output {
    /// It exited with 0.
    pub success: bool,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error; warnings of admission come here.
    pub stderr: String,
    command: String,
}

impl Output {
    /// The standard output, or an error with everything it said.
    pub fn ok(self) -> Result<String> {
        if self.success {
            return Ok(self.stdout);
        }
        bail!("`{}` failed:\n{}{}", self.command, self.stdout, self.stderr)
    }
}

impl Kubectl {
    /// This program, for the cluster of this kubeconfig, with its cache in that directory.
    pub fn new(program: impl Into<PathBuf>, kubeconfig: impl Into<PathBuf>, cache: impl AsRef<Path>) -> Self {
        Self { program: program.into(), kubeconfig: kubeconfig.into(), cache: cache.as_ref().join("kubectl-cache") }
    }

    /// Runs it; `stdin` feeds `-f -`.
    pub async fn run(&self, args: &[&str], stdin: &str) -> Result<Output> {
        self.run_within(DEADLINE, args, stdin).await
    }

    /// [`Kubectl::run`], for what may take longer.
    pub async fn run_within(&self, deadline: Duration, args: &[&str], stdin: &str) -> Result<Output> {
        let mut command = process::dying_with_us(&self.program);
        command
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .arg("--cache-dir")
            .arg(&self.cache)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = tokio::process::Command::from(command)
            .kill_on_drop(true)
            .spawn()
            .context("cannot start kubectl: `make setup` builds it, and setpriv comes with util-linux")?;
        let mut input = child.stdin.take().context("kubectl has no standard input")?;
        let feed = async {
            // A kubectl that reads nothing closes the pipe: no error of ours.
            let _ = input.write_all(stdin.as_bytes()).await;
            drop(input);
        };
        let shown = format!("kubectl {}", args.join(" "));
        let ((), done) = tokio::time::timeout(deadline, async { tokio::join!(feed, child.wait_with_output()) })
            .await
            .with_context(|| format!("`{shown}` did not end within {deadline:?}"))?;
        let done = done.with_context(|| format!("cannot read what `{shown}` says"))?;
        Ok(Output {
            success: done.status.success(),
            stdout: String::from_utf8_lossy(&done.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&done.stderr).into_owned(),
            command: shown,
        })
    }

    /// Creates the objects of a manifest; an error if the API server refuses any. Warnings are in the result's `stderr`.
    pub async fn accepts(&self, manifest: &str) -> Result<Output> {
        let output = self.run(&["create", "-f", "-"], manifest).await?;
        if !output.success {
            bail!("should have been accepted:\n{manifest}\nbut kubectl said:\n{}", output.stderr);
        }
        Ok(output)
    }

    /// An error unless the API server refuses the manifest with a message that contains `reason`. Returns the message.
    pub async fn rejects(&self, manifest: &str, reason: &str) -> Result<String> {
        let output = self.run(&["create", "-f", "-"], manifest).await?;
        if output.success {
            bail!("should have been refused:\n{manifest}\nbut kubectl said:\n{}{}", output.stdout, output.stderr);
        }
        if !output.stderr.contains(reason) {
            bail!("refused, as it should, but the message does not say {reason:?}:\n{}", output.stderr);
        }
        Ok(output.stderr)
    }

    /// What a person would look at first when something in this namespace went wrong.
    pub async fn dump(&self, namespace: &str) -> String {
        let mut text = format!("state of the namespace {namespace}:\n");
        for what in ["pods", "vmi", "vmim", "migrationforecasts", "migrationplans", "events"] {
            let args = ["get", what, "-n", namespace, "-o", "wide", "--ignore-not-found"];
            let found = match self.run(&args, "").await {
                Ok(output) if !output.success => output.stderr,
                Ok(output) if output.stdout.is_empty() => "none\n".to_owned(),
                Ok(output) => format!("\n{}", output.stdout),
                Err(error) => format!("{error:#}\n"),
            };
            text.extend([what, ": ", &found]);
        }
        text
    }
}

impl ControlPlane {
    /// The real kubectl as the administrator.
    pub fn kubectl_program(&self) -> Kubectl {
        Kubectl::new(self.tools().join("kubectl"), self.kubeconfig(), self.directory())
    }

    /// Runs kubectl as the administrator; `stdin` feeds `-f -`.
    pub async fn kubectl(&self, args: &[&str], stdin: &str) -> Result<Output> {
        self.kubectl_program().run(args, stdin).await
    }

    /// [`Kubectl::accepts`]
    pub async fn accepts(&self, manifest: &str) -> Result<Output> {
        self.kubectl_program().accepts(manifest).await
    }

    /// [`Kubectl::rejects`]
    pub async fn rejects(&self, manifest: &str, reason: &str) -> Result<String> {
        self.kubectl_program().rejects(manifest, reason).await
    }

    /// [`Kubectl::dump`]
    pub async fn dump(&self, namespace: &str) -> String {
        self.kubectl_program().dump(namespace).await
    }

    /// A new namespace for one test, with the label that namespace selectors of tests go by: `e2e.migvisor.io/test=PREFIX`.
    pub async fn namespace(&self, prefix: &str) -> Result<String> {
        let name = self.unique(prefix);
        let namespace: Namespace = serde_json::from_value(json!({
            "metadata": { "name": name, "labels": { "e2e.migvisor.io/test": prefix } },
        }))?;
        let api: Api<Namespace> = Api::all(self.client()?);
        api.create(&PostParams::default(), &namespace).await.with_context(|| format!("cannot create the namespace {name}"))?;
        self.namespace_is_ready(&name).await?;
        Ok(name)
    }
}
