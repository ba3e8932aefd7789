//! Who writes which page when.

/// (to come)
#[derive(Debug, Clone)]
pub struct Pattern {}
