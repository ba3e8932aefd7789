//! The real kubectl, and manifests that the API server has to accept or refuse.

use std::{process::Stdio, time::Duration};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Namespace;
use kube::{Api, api::PostParams};
use serde_json::json;
use tokio::io::AsyncWriteExt;

use super::ControlPlane;
use crate::process;

/// A kubectl that talks for longer than this hangs.
const DEADLINE: Duration = Duration::from_secs(60);

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

impl ControlPlane {
    /// Runs kubectl as the administrator; `stdin` feeds `-f -`.
    pub async fn kubectl(&self, args: &[&str], stdin: &str) -> Result<Output> {
        let mut command = process::dying_with_us(self.tools().join("kubectl"));
        command
            .arg("--kubeconfig")
            .arg(self.kubeconfig())
            .arg("--cache-dir")
            .arg(self.directory().join("kubectl-cache"))
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
        let ((), done) = tokio::time::timeout(DEADLINE, async { tokio::join!(feed, child.wait_with_output()) })
            .await
            .with_context(|| format!("`{shown}` did not end within {DEADLINE:?}"))?;
        let done = done.with_context(|| format!("cannot read what `{shown}` says"))?;
        Ok(Output {
            success: done.status.success(),
            stdout: String::from_utf8_lossy(&done.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&done.stderr).into_owned(),
            command: shown,
        })
    }

    /// A new namespace for one test, with the label that namespace selectors of tests go by: `e2e.migvisor.io/test=PREFIX`.
    pub async fn namespace(&self, prefix: &str) -> Result<String> {
        let name = self.unique(prefix);
        let namespace: Namespace = serde_json::from_value(json!({
            "metadata": { "name": name, "labels": { "e2e.migvisor.io/test": prefix } },
        }))?;
        let api: Api<Namespace> = Api::all(self.client()?);
        api.create(&PostParams::default(), &namespace).await.with_context(|| format!("cannot create the namespace {name}"))?;
        Ok(name)
    }

    /// Creates the objects of a manifest; an error if the API server refuses any. Warnings are in the result's `stderr`.
    pub async fn accepts(&self, manifest: &str) -> Result<Output> {
        let output = self.kubectl(&["create", "-f", "-"], manifest).await?;
        if !output.success {
            bail!("should have been accepted:\n{manifest}\nbut kubectl said:\n{}", output.stderr);
        }
        Ok(output)
    }

    /// An error unless the API server refuses the manifest with a message that contains `reason`. Returns the message.
    pub async fn rejects(&self, manifest: &str, reason: &str) -> Result<String> {
        let output = self.kubectl(&["create", "-f", "-"], manifest).await?;
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
            let found = match self.kubectl(&args, "").await {
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
