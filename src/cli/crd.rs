//! `migvisor crd`: prints our custom resources, to be piped into `kubectl apply -f -`.
//!
//! In: nothing. Out: YAML documents, the same that are checked in under `crds/`.

use std::io::{self, ErrorKind, Write};

use crate::api;

/// Why the custom resources could not be printed.
#[derive(Debug, thiserror::Error)]
pub enum CrdError {
    /// A schema could not be written as YAML.
    #[error("cannot write the custom resource {name} as YAML: {source}; this is a bug in migvisor")]
    Yaml {
        /// Which.
        name: String,
        /// Why.
        source: serde_yaml::Error,
    },
    /// Standard output is gone.
    #[error("cannot write to standard output: {0}")]
    Output(#[from] io::Error),
}

/// Each custom resource's name and its YAML.
///
/// # Errors
/// A schema cannot be written as YAML.
pub fn documents() -> Result<Vec<(String, String)>, CrdError> {
    api::crds()
        .into_iter()
        .map(|crd| {
            let name = crd.metadata.name.clone().unwrap_or_default();
            let yaml = serde_yaml::to_string(&crd).map_err(|source| CrdError::Yaml { name: name.clone(), source })?;
            Ok((name, format!("# Written by `migvisor crd`: change src/api, not this file.\n{yaml}")))
        })
        .collect()
}

/// Prints them to standard output. Whoever stops reading early (`migvisor crd | head`) has read enough: that is no error.
///
/// # Errors
/// A schema cannot be written as YAML, or standard output fails.
pub fn run() -> Result<(), CrdError> {
    let mut out = io::stdout().lock();
    let text: Vec<_> = documents()?.into_iter().map(|(_, yaml)| yaml).collect();
    match out.write_all(text.join("---\n").as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}
