//! The connection to the API server: `--kubeconfig`, else `KUBECONFIG` or `~/.kube/config`, else the pod's own account.

use std::path::{Path, PathBuf};

use kube::{
    Client, Config,
    config::{InferConfigError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The file that was named is no usable kubeconfig.
    #[error("the kubeconfig {}: {source}; check the path and try `kubectl --kubeconfig {} version`", path.display(), path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: KubeconfigError,
    },
    /// Neither a kubeconfig nor a service account.
    #[error("no way to reach an API server: {0}; pass --kubeconfig FILE, set KUBECONFIG, or run in a pod with a service account")]
    Infer(#[from] InferConfigError),
    /// The configuration does not make a client.
    #[error("the API server's address or credentials are unusable: {0}; check server, certificates and token of the kubeconfig")]
    Client(#[source] kube::Error),
}

/// Makes aws-lc-rs the crypto provider of rustls in this process. Any number of calls is fine; the first one wins.
pub fn install_crypto() {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

/// A client for the API server. Does not connect yet: an unreachable server shows at the first request.
pub async fn connect(kubeconfig: Option<&Path>) -> Result<Client, ClientError> {
    install_crypto();
    let config = match kubeconfig {
        None => Config::infer().await?,
        Some(path) => {
            let wrong = |source| ClientError::Kubeconfig { path: path.to_owned(), source };
            let file = Kubeconfig::read_from(path).map_err(wrong)?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(wrong)?
        }
    };
    Client::try_from(config).map_err(ClientError::Client)
}

/// An error with its causes: kube's own text ends at `client error (Connect)`, the causes say `Connection refused`.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn a_missing_kubeconfig_is_named() {
        let Err(error) = connect(Some(Path::new("no/such/kubeconfig"))).await else { unreachable!() };
        let text = error.to_string();
        assert!(text.contains("no/such/kubeconfig") && text.contains("kubectl"), "{text}");
    }

    #[tokio::test]
    async fn an_unreachable_server_says_why() {
        install_crypto();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let client = Client::try_from(Config::new(format!("http://{free}").parse().unwrap())).unwrap();
        let error = client.apiserver_version().await.unwrap_err();
        let text = with_causes(&error);
        assert!(text.contains("refused") && text.matches("client error").count() == 1, "{text}");
    }
}
