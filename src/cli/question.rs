//! The arguments that ask a question, and those that say how to look. In: text. Out: the model's types, or an error that
//! names the option.

use std::{path::PathBuf, time::Duration};

use anyhow::bail;
use clap::{ArgGroup, Args};

use super::host;
use crate::{
    api::scalar,
    collector::{LookOptions, SourceKind, Target},
    model::{
        forecast::{CostWeights, Question, Sla},
        kubevirt::{DEFAULT_COMPLETION_TIMEOUT_PER_GIB, time_budget},
        units::{Bandwidth, Bytes, BytesPerSecond, FASTEST, SLOWEST},
    },
    qemu::libvirt::{LibvirtAddress, Socket},
};

/// QEMU's own end: 2 000 s.
const LONGEST_DOWNTIME: Duration = Duration::from_secs(2000);

/// What the migration would run under.
#[derive(Debug, Args)]
#[command(next_help_heading = "Migration")]
pub(super) struct QuestionArgs {
    #[command(flatten)]
    terms: TermsArgs,
    /// QEMU's downtime-limit: 300ms, 1.5s.
    #[arg(long, default_value = "300ms", value_parser = downtime)]
    downtime_limit: Duration,
}

impl QuestionArgs {
    /// The question about a guest of this size.
    pub(super) fn question(&self, ram: Bytes) -> anyhow::Result<Question> {
        self.terms.question(ram, self.downtime_limit)
    }
}

/// The same, but for the downtime limit, of which there may be several.
#[derive(Debug, Args)]
#[command(next_help_heading = "Migration")]
pub(super) struct TermsArgs {
    /// QEMU's max-bandwidth, in bytes per second: 100Mi, 1Gi; 0 or `unlimited` for no cap.
    #[arg(long, value_parser = bandwidth)]
    bandwidth: Bandwidth,
    /// How long the migration may take: 300s, 5m; 0 for ever. Default: KubeVirt's, 150 s × ceil(RAM / 10⁹ bytes).
    #[arg(long, value_parser = duration)]
    time_budget: Option<Duration>,
    /// What the line carries when nothing caps it, in bytes per second. Default: from --host, else 2200Mi, assumed.
    #[arg(long, value_parser = line_rate)]
    line_rate: Option<BytesPerSecond>,
    /// Host constants as YAML or JSON: lineRate, zeroPagesPerMs, setupMs, syncMs, completionMs; what is left out is assumed.
    #[arg(long, value_name = "FILE")]
    host: Option<PathBuf>,
    /// A longer downtime than this is too long, even if the migration converges.
    #[arg(long, value_parser = downtime)]
    sla_downtime: Option<Duration>,
    /// A longer migration than this is too long, even if it converges.
    #[arg(long, value_parser = duration)]
    sla_total_time: Option<Duration>,
}

impl TermsArgs {
    /// What the line carries, where somebody said so.
    pub(super) fn line(&self, question: &Question) -> Option<BytesPerSecond> {
        (self.line_rate.is_some() || self.host.is_some()).then_some(question.host.line_rate)
    }

    /// The question about a guest of this size.
    pub(super) fn question(&self, ram: Bytes, downtime_limit: Duration) -> anyhow::Result<Question> {
        let mut host = host::constants(self.host.as_deref())?;
        if let Some(rate) = self.line_rate {
            host.line_rate = rate;
        }
        let time_budget = match self.time_budget {
            None => time_budget(DEFAULT_COMPLETION_TIMEOUT_PER_GIB, ram),
            Some(budget) => (!budget.is_zero()).then_some(budget),
        };
        let limit = |limit: Option<Duration>| limit.filter(|limit| !limit.is_zero());
        Ok(Question {
            bandwidth: self.bandwidth,
            downtime_limit,
            time_budget,
            host,
            sla: Sla { downtime: limit(self.sla_downtime), total_time: limit(self.sla_total_time) },
            weights: CostWeights::default(),
        })
    }
}

/// Which VM.
#[derive(Debug, Args)]
#[command(next_help_heading = "VM", group = ArgGroup::new("vm").args(["qmp", "libvirt"]).required(true))]
pub(super) struct TargetArgs {
    /// QEMU's QMP socket. QEMU serves one client per socket: give it one of its own.
    #[arg(long, value_name = "SOCKET")]
    qmp: Option<PathBuf>,
    /// The libvirt daemon that runs the VM: `qemu:///system`, `qemu:///session`, or the path of its socket.
    #[arg(long, value_name = "URI")]
    libvirt: Option<Socket>,
    /// The name of its domain. Default: the only one that runs there.
    #[arg(long, value_name = "NAME", requires = "libvirt", conflicts_with = "qmp")]
    domain: Option<String>,
    /// QEMU's process. Default: whoever is at the other end of the QMP socket, or bears the domain's UUID.
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
}

impl TargetArgs {
    pub(super) fn target(&self) -> anyhow::Result<Target> {
        let monitor = match (&self.qmp, &self.libvirt) {
            (Some(socket), None) => socket.clone().into(),
            (None, Some(socket)) => LibvirtAddress { socket: socket.clone(), domain: self.domain.clone(), owner: None }.into(),
            // The command line is judged before.
            _ => bail!("name one VM: --qmp SOCKET, or --libvirt URI and --domain NAME"),
        };
        Ok(Target { monitor, pid: self.pid })
    }
}

/// Which VM, and how to look at it.
#[derive(Debug, Args)]
#[command(next_help_heading = "VM")]
pub(super) struct LookArgs {
    #[command(flatten)]
    target: TargetArgs,
    /// How long to look: about as long as the migration would take.
    #[arg(long, default_value = "12s", value_parser = duration)]
    look: Duration,
    /// By what means to look.
    #[arg(long, value_enum, default_value_t)]
    source: SourceKind,
}

impl LookArgs {
    pub(super) fn target(&self) -> anyhow::Result<Target> {
        self.target.target()
    }

    pub(super) fn options(&self) -> anyhow::Result<LookOptions> {
        let sensible = Duration::from_millis(500)..=Duration::from_secs(600);
        if !sensible.contains(&self.look) {
            bail!("--look {:?} is not between 500ms and 10m", self.look);
        }
        Ok(LookOptions { duration: self.look, source: self.source, ..LookOptions::default() })
    }
}

/// Go's notation, as everywhere in Kubernetes; a plain 0 needs no unit.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let parsed: scalar::Duration = text.parse().map_err(|error| format!("{error}; write 300ms, 20s or 5m"))?;
    Ok(parsed.0)
}

pub(super) fn downtime(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        limit if limit.is_zero() => {
            Err("QEMU with a limit of 0 waits for a guest that writes nothing; its default is 300ms".into())
        }
        limit if limit > LONGEST_DOWNTIME => Err("QEMU allows at most 2000s".into()),
        limit => Ok(limit),
    }
}

fn bandwidth(text: &str) -> Result<Bandwidth, String> {
    let parsed: Bandwidth = text.parse().map_err(|error: crate::model::units::ParseQuantityError| error.to_string())?;
    match parsed.cap() {
        Some(BytesPerSecond(rate)) if rate < SLOWEST.0 => {
            Err(format!("{rate} bytes per second would move one page in {:.1} s; did you mean {rate}Mi?", 4096.0 / rate as f64))
        }
        Some(rate) if rate > FASTEST => Err("no line carries more than 1Ti bytes per second".into()),
        _ => Ok(parsed),
    }
}

fn line_rate(text: &str) -> Result<BytesPerSecond, String> {
    bandwidth(text)?.cap().ok_or_else(|| "a line has a rate; leave the option out where it is not known".into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn slips_of_the_pen_are_caught_with_a_way_out() {
        assert!(bandwidth("100").unwrap_err().contains("did you mean 100Mi?"));
        assert!(bandwidth("5Ti").unwrap_err().contains("no line"));
        assert!(
            bandwidth("-1").unwrap_err().contains("not be negative") || bandwidth("-1").unwrap_err().contains("not negative")
        );
        assert!(downtime("0").unwrap_err().contains("300ms"));
        assert!(downtime("-1s").unwrap_err().contains("write 300ms"));
        assert!(downtime("300").unwrap_err().contains("write 300ms"));
        assert!(line_rate("0").unwrap_err().contains("leave the option out"));
    }

    #[test]
    fn what_people_write_is_read() {
        assert_eq!(bandwidth("unlimited"), Ok(Bandwidth::Unlimited));
        assert_eq!(bandwidth("100Mi"), Ok(Bandwidth::Capped(BytesPerSecond(100 << 20))));
        assert_eq!(duration("1m30s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        assert_eq!(downtime("1.5s"), Ok(Duration::from_millis(1500)));
    }
}
