//! A VM as a plan sees it. Pure.
//!
//! In: the VM, its question, what its answer is worth. Out: what moving it would be like, or why nobody can tell; what that frees.

use crate::{
    api::{MigrationForecastSpec, kubevirt::VirtualMachineInstance, names::reason},
    decision::Assessment,
    manager::question,
    model::{
        plan::Outlook,
        units::{Bytes, MilliCpus},
    },
};

/// A VM, as the manager knows it.
#[derive(Debug, Clone)]
pub struct Vm<'a> {
    /// What KubeVirt says of it.
    pub vmi: &'a VirtualMachineInstance,
    /// What should be asked about it; `None`: nothing is.
    pub present: Option<&'a MigrationForecastSpec>,
    /// What the stored answer is worth.
    pub assessment: Assessment,
    /// A migration of it is under way.
    pub migrating: bool,
    /// Why no other node can take it.
    pub no_room: Option<String>,
}

/// Why a VM is not eligible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// One of [`reason`].
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

impl Vm<'_> {
    /// What moving it would be like; or why nobody can tell, or nobody should.
    pub fn outlook(&self) -> Result<Outlook, Obstacle> {
        let obstacle = |reason, message: &str| Err(Obstacle { reason, message: message.to_owned() });
        if self.migrating {
            return obstacle(reason::MIGRATING, "a migration of it is under way already");
        }
        let Some(present) = self.present else {
            let stuck = self.vmi.condition("LiveMigratable").filter(|condition| condition.status == "False");
            return match stuck {
                Some(why) if why.message.is_empty() => obstacle(reason::NOT_MIGRATABLE, "KubeVirt cannot migrate it"),
                Some(why) => obstacle(reason::NOT_MIGRATABLE, &why.message),
                None => obstacle(reason::NO_ANSWER, "it is not running yet, or its place is not known"),
            };
        };
        if let Some(why) = &self.no_room {
            return obstacle(reason::NO_NODE, why);
        }
        let forecast = match &self.assessment {
            Assessment::Known(forecast) => (**forecast).clone(),
            Assessment::Unknown(reason, message) => return obstacle(reason, message),
        };
        match (present.question(), present.guest_memory()) {
            (Ok(question), Ok(guest)) => Ok(Outlook { question, forecast, guest }),
            (Err(error), _) | (_, Err(error)) => obstacle(reason::BAD_QUESTION, &error.to_string()),
        }
    }

    /// Memory that its leaving frees.
    pub fn memory(&self) -> Bytes {
        question::guest_memory(self.vmi).unwrap_or_default()
    }

    /// Processors that its leaving frees: what it requests, else how many it has.
    pub fn cpu(&self) -> MilliCpus {
        let domain = &self.vmi.spec.domain;
        let requested = domain.resources.requests.get("cpu").and_then(|quantity| quantity.processors().ok());
        let one = |count: Option<u64>| count.unwrap_or(1).max(1);
        requested.unwrap_or_else(|| {
            let threads = one(domain.cpu.sockets).saturating_mul(one(domain.cpu.cores)).saturating_mul(one(domain.cpu.threads));
            MilliCpus(threads.saturating_mul(1000))
        })
    }
}
