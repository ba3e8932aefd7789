//! Certificates for a control plane that lives for one test: an authority, a server's certificate, people's certificates.
//!
//! In: names. Out: PEM. Nothing here is secret for longer than the test, and nothing is written to disk by this module.

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

/// A certificate and its key, both PEM.
#[derive(Debug, Clone)]
pub struct Pair {
    /// The certificate.
    pub certificate: String,
    /// Its private key (PKCS #8).
    pub key: String,
}

/// A certificate authority.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
}

impl Authority {
    /// A new authority of this name.
    pub fn new(name: &str) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name = distinguished(name, None);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate().context("cannot make the authority's key")?;
        let certificate = params.self_signed(&key).context("cannot sign the authority's certificate")?.pem();
        Ok(Self { issuer: Issuer::new(params, key), certificate })
    }

    /// The authority's own certificate, PEM: what others are told to trust.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// A serving certificate for 127.0.0.1, localhost and these further names.
    pub fn server(&self, names: &[&str]) -> Result<Pair> {
        let all = ["127.0.0.1", "localhost"].iter().chain(names).map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let params = CertificateParams::new(all).context("a name that no certificate can carry")?;
        self.sign(params, "server", None, ExtendedKeyUsagePurpose::ServerAuth)
    }

    /// A client certificate: Kubernetes takes the common name as the user and the organisation as its group.
    pub fn client(&self, user: &str, group: Option<&str>) -> Result<Pair> {
        self.sign(CertificateParams::default(), user, group, ExtendedKeyUsagePurpose::ClientAuth)
    }

    fn sign(
        &self,
        mut params: CertificateParams,
        name: &str,
        group: Option<&str>,
        usage: ExtendedKeyUsagePurpose,
    ) -> Result<Pair> {
        params.distinguished_name = distinguished(name, group);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().with_context(|| format!("cannot make a key for {name}"))?;
        let certificate =
            params.signed_by(&key, &self.issuer).with_context(|| format!("cannot sign the certificate of {name}"))?;
        Ok(Pair { certificate: certificate.pem(), key: key.serialize_pem() })
    }
}

/// The key pair that signs service-account tokens: (private, public), both PEM.
pub(super) fn token_keys() -> Result<(String, String)> {
    let key = KeyPair::generate().context("cannot make the key for service-account tokens")?;
    Ok((key.serialize_pem(), key.public_key_pem()))
}

fn distinguished(name: &str, group: Option<&str>) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    if let Some(group) = group {
        distinguished.push(DnType::OrganizationName, group);
    }
    distinguished
}
