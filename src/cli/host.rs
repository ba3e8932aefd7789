//! `--host FILE`: what is known of a host. In: a file, YAML or JSON. Out: its constants, or an error that names the file and says what to write.

use std::path::{Path, PathBuf};

use crate::model::forecast::HostConstants;

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("--host {}: {why}", path.display())]
pub struct HostError {
    path: PathBuf,
    why: String,
}

/// The host's constants; those that are absent, or all where there is no file, are assumed.
pub(super) fn constants(path: Option<&Path>) -> Result<HostConstants, HostError> {
    let Some(path) = path else { return Ok(HostConstants::default()) };
    let wrong = |why: String| HostError { path: path.to_owned(), why };
    let text = std::fs::read_to_string(path).map_err(|error| wrong(format!("{error}; it has to be a readable file")))?;
    let host: HostConstants =
        serde_yaml::from_str(&text).map_err(|error| wrong(format!("{error}; write YAML or JSON such as `setupMs: 3.0`")))?;
    host.check().map_err(|error| wrong(error.to_string()))?;
    Ok(host)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn constants_of_the_host_are_read_leniently_and_judged_strictly() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("host.yaml");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            constants(Some(&path)).map_err(|error| error.to_string())
        };
        assert_eq!(read("setupMs: 9").unwrap(), HostConstants { setup_ms: 9.0, ..HostConstants::default() });
        assert_eq!(read(r#"{"syncMs": 1.5}"#).unwrap(), HostConstants { sync_ms: 1.5, ..HostConstants::default() });
        for (text, says) in
            [("setup: 9", "unknown field"), ("setupMs: .nan", "between"), ("lineRate: 0", "above zero"), ("[", "YAML")]
        {
            let error = read(text).unwrap_err();
            assert!(error.contains(says) && error.contains("host.yaml"), "{text}: {error}");
        }
        assert_eq!(constants(None).unwrap(), HostConstants::default());
        let missing = constants(Some(&dir.path().join("none"))).unwrap_err().to_string();
        assert!(missing.starts_with("--host ") && missing.contains("a readable file"), "{missing}");
    }
}
