//! What a machine cannot show is skipped, and said: a test that passes is silent, so what it left out is noted where `make test` lists it.
//!
//! In: words. Out: a line in the file that `$MIGVISOR_SKIPPED` names, and on standard error.

use std::{fs::File, io::Write};

use crate::lab::vm::kvm;

/// Notes that this was not shown, and why.
pub fn note(what: &str) {
    eprintln!("SKIPPED: {what}");
    let Some(list) = std::env::var_os("MIGVISOR_SKIPPED") else { return };
    let noted = File::options().create(true).append(true).open(&list).and_then(|mut file| writeln!(file, "{what}"));
    if let Err(error) = noted {
        eprintln!("cannot note it in {}: {error}", list.display());
    }
}

/// Are there guests under KVM? Else it is noted that `what`, which they alone can show, was not.
pub fn unless_kvm(what: &str) -> bool {
    if !kvm() {
        note(&format!("{what}: needs KVM"));
    }
    kvm()
}
