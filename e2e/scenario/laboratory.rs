//! The laboratory as a cluster of the scenarios: a whole control plane, KubeVirt's stand-in, real guests on two nodes, and the product's
//! controller and agents with the rights of `config/base`.
//!
//! In: nothing. Out: a cluster that can give everything.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use migvisor::model::forecast::HostConstants;
use serde_json::{Value, json};

use super::Load;
use crate::{
    cluster::{ControlPlane, free_port},
    kubevirt::objects,
    lab::{GuestSpec, VmSpec},
    world::{NODE, OTHER_NODE, World, get},
};

/// A node of its own: VMs are put there by name only.
pub(super) const WITHOUT_AGENT: &str = "node-c";
/// The parts of the product, by the names of their processes; an agent with its node.
const AGENTS: [(&str, &str); 2] = [("agent-a", NODE), ("agent-b", OTHER_NODE)];
const CONTROLLER: &str = "controller";
/// A guest that settles writes for so long, then keeps from it for as long. The agent looks at it twice until then (the second time 15 s after the
/// first), and next when it has rested for 8 s or more: in between the pattern is of another time.
pub(super) const SETTLES: Duration = Duration::from_secs(28);
/// Shorter than in production: what is looked for is plain.
const LOOK: &str = "3s";

/// See the module.
pub(super) struct Laboratory {
    world: World,
    health: [String; 2],
}

impl Laboratory {
    pub(super) async fn start() -> Result<Self> {
        let mut world = World::start_whole(json!({})).await?;
        let client = world.plane().client()?;
        objects::create_node(&client, WITHOUT_AGENT).await?;
        // Nothing goes there by itself.
        world
            .plane()
            .kubectl(&["label", "node", WITHOUT_AGENT, "kubevirt.io/schedulable=false", "--overwrite"], "")
            .await?
            .ok()?;
        let gates = json!({ "spec": { "configuration": { "developerConfiguration": { "featureGates": ["DecentralizedLiveMigration"] } } } });
        let patch = ["patch", "kubevirt", "kubevirt", "-n", "kubevirt", "--type=merge", "-p", &gates.to_string()];
        world.plane().kubectl(&patch, "").await?.ok()?;
        world.start_controller(&[]).await?;
        let health = [free_address()?, free_address()?];
        let mut laboratory = Self { world, health };
        for (name, _) in AGENTS {
            laboratory.start_agent(name).await?;
        }
        Ok(laboratory)
    }

    pub(super) fn plane(&self) -> &ControlPlane {
        self.world.plane()
    }

    async fn start_agent(&mut self, name: &str) -> Result<()> {
        let at = AGENTS.iter().position(|(agent, _)| *agent == name).with_context(|| format!("there is no agent {name}"))?;
        let ((name, node), health) = (AGENTS[at], self.health[at].clone());
        let host = self.world.plane().directory().join("host.json");
        std::fs::write(&host, serde_json::to_vec(&HostConstants::default())?).context("cannot write the host's constants")?;
        let (host, sockets) = (host.to_string_lossy().into_owned(), self.world.sockets().to_string_lossy().into_owned());
        self.world.start_agent_on(name, node, &health, &["--host", &host, "--qmp-dir", &sockets, "--look", LOOK]).await
    }

    pub(super) async fn boot(&self, namespace: &str, name: &str, load: Load, labels: &Value, node: Option<&str>) -> Result<()> {
        let guest = match load {
            Load::Idle => None,
            // 128 MiB of data, 16 MiB/s written: at 64 MiB/s it takes about 2.6 s.
            Load::Calm => Some(VmSpec::new(GuestSpec::uniform(32_768, 4))),
            Load::Large => Some(VmSpec::new(GuestSpec::uniform(32_768, 4)).memory_mib(1024)),
            // 64 MiB of data, 78 MiB/s written to.
            Load::Steady => Some(VmSpec::new(GuestSpec::uniform(16_384, 20))),
            Load::Busy => Some(VmSpec::new(GuestSpec::uniform(16_384, 20).computing())),
            // 128 MiB of data, 47 MiB/s written: at 64 MiB/s it takes about 4 s, and 2 s once it rests.
            Load::Settling => Some(VmSpec::new(GuestSpec::phased(32_768, 12, u32::try_from(SETTLES.as_millis())?))),
            // 256 MiB of data, up to 234 MiB/s written.
            Load::Wild => Some(VmSpec::new(GuestSpec::uniform(65_536, 60))),
        };
        match guest {
            None => self.world.announce(namespace, name, node.unwrap_or(NODE)).await?,
            Some(guest) => drop(self.world.boot(namespace, name, guest).await?),
        }
        if labels.as_object().is_some_and(|labels| !labels.is_empty()) {
            let patch = json!({ "metadata": { "labels": labels } }).to_string();
            self.plane().kubectl(&["patch", "vmi", name, "-n", namespace, "--type=merge", "-p", &patch], "").await?.ok()?;
        }
        Ok(())
    }

    pub(super) async fn restart_api_server(&self, away: Duration) -> Result<()> {
        self.plane().stop_api_server();
        tokio::time::sleep(away).await;
        self.plane().restart_api_server().await
    }

    pub(super) async fn kill_controller(&mut self) -> Result<()> {
        self.world.process(CONTROLLER)?.kill();
        self.world.start_controller(&[]).await
    }

    pub(super) async fn kill_agent(&mut self, node: &str) -> Result<()> {
        let (name, _) = AGENTS.into_iter().find(|(_, of)| *of == node).with_context(|| format!("no agent runs on {node}"))?;
        self.world.process(name)?.kill();
        self.start_agent(name).await
    }

    pub(super) async fn metrics(&self) -> Result<String> {
        let (status, text) = get(&format!("http://{}/metrics", self.world.controller_health).parse()?).await?;
        ensure!(status == 200, "no metrics: {status}");
        Ok(text)
    }

    pub(super) fn is_well(&mut self) -> Result<()> {
        for name in AGENTS.map(|(name, _)| name).into_iter().chain([CONTROLLER]) {
            let process = self.world.process(name)?;
            process.still_runs()?;
            ensure!(!process.log().contains("panicked"), "{name} panicked:\n{}", process.log_tail(40));
        }
        let refused = self.plane().refused()?;
        ensure!(refused.is_empty(), "rights that are missing in config/base: {refused:#?}");
        Ok(())
    }
}

fn free_address() -> Result<String> {
    Ok(format!("127.0.0.1:{}", free_port()?))
}
