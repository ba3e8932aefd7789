//! Which question an answer answers: a fingerprint of the question, the same in every process and version.
//!
//! In: a forecast's spec. Out: 16 hexadecimal digits. An answer names the question it answers by them, so that it stands while
//! something else of the spec changes (`dryRun`, `remedies`), and falls at once with any change of the question, written or not yet written.

use std::hash::Hasher;

use fnv::FnvHasher;

use super::forecast::{MigrationForecast, MigrationForecastSpec, MigrationForecastStatus};

/// A question, as an answer names it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct QuestionRef {
    /// Of the spec but for what is asked beside the question: see [`MigrationForecastSpec::fingerprint`].
    pub fingerprint: String,
    /// The generation of the object, for people and tools.
    pub generation: i64,
}

impl MigrationForecastSpec {
    /// The question alone: without what is asked beside it.
    #[must_use]
    pub fn question_only(&self) -> Self {
        Self { dry_run: None, remedies: Vec::new(), ..self.clone() }
    }

    /// 16 hexadecimal digits that are the same for the same question, and other ones, but for one case in 2⁶⁴, for another.
    ///
    /// FNV-1a (64 bits) over the JSON of [`Self::question_only`], its keys sorted and without white space: it depends on neither the
    /// order in which fields are declared or written nor on the version of a compiler. A field that is absent counts as not there,
    /// so that optional fields can be added without making every stored answer outdated. Who writes questions is trusted: it is no
    /// cryptographic hash.
    pub fn fingerprint(&self) -> String {
        // Such a structure has no keys that JSON cannot hold: it always becomes a value.
        of_json(serde_json::to_value(self.question_only()).unwrap_or_default())
    }
}

/// [`of`] a JSON value, in whatever order its keys are written.
pub fn of_json(mut value: serde_json::Value) -> String {
    value.sort_all_objects();
    of(&value.to_string())
}

/// FNV-1a of a text, as 16 hexadecimal digits.
pub fn of(text: &str) -> String {
    let mut hasher = FnvHasher::default();
    hasher.write(text.as_bytes());
    format!("{:016x}", hasher.finish())
}

impl MigrationForecast {
    /// The question as it is asked here, for an answer to name.
    pub fn question(&self) -> QuestionRef {
        QuestionRef { fingerprint: self.spec.fingerprint(), generation: self.metadata.generation.unwrap_or_default() }
    }

    /// The status, if it answers the question as it is asked here (and not an earlier one).
    pub fn answer(&self) -> Option<&MigrationForecastStatus> {
        self.answer_to(&self.spec)
    }

    /// The status, if it answers this question. What is asked here may be another one by now, or not yet this one again.
    pub fn answer_to(&self, question: &MigrationForecastSpec) -> Option<&MigrationForecastStatus> {
        // A status without an answer names no question: nothing to compute.
        let status = self.status.as_ref().filter(|status| status.question.is_some())?;
        (status.question.as_deref() == Some(question.fingerprint().as_str())).then_some(status)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    use super::*;

    fn read(value: Value) -> MigrationForecastSpec {
        serde_json::from_value(value).unwrap()
    }

    fn whole() -> Value {
        json!({
            "nodeName": "n", "podUID": "u", "guestMemory": "1Gi", "bandwidth": "100Mi", "bandwidthSource": "PredictionPolicy",
            "downtimeLimit": "300ms", "timeBudget": "300s", "sla": { "downtime": "1s", "totalTime": "60s" },
            "costWeights": { "totalTime": 0.5, "downtime": 0.25, "pages": 0.125 },
            "host": { "lineRate": "1Gi", "zeroPagesPerMs": 1800.0, "setupMs": 3.0, "syncMs": 0.5, "completionMs": 5.0 },
            "policy": "gold", "whenBudgetEnds": "PostCopy", "autoConverge": true, "paused": true, "outsideModel": "words"
        })
    }

    /// Written once, by version 0.1. If this fails, every stored answer becomes outdated with the upgrade: do not do that lightly.
    #[test]
    fn it_is_the_same_in_every_version() {
        let short = json!({
            "nodeName": "n", "podUID": "u", "guestMemory": "1Gi", "bandwidth": "100Mi", "bandwidthSource": "PredictionPolicy", "downtimeLimit": "300ms"
        });
        assert_eq!(
            (read(short).fingerprint().as_str(), read(whole()).fingerprint().as_str()),
            ("5910935b63ee73e8", "f45890bfcd869328")
        );
        assert_eq!(of(""), "cbf29ce484222325", "FNV's offset basis");
        assert_eq!(of("foobar"), "85944171f73967e8", "a published test vector of FNV-1a");
    }

    /// Every place at which two JSON values can differ: each leaf, by its path.
    fn leaves(value: &Value, path: &str, found: &mut Vec<String>) {
        match value {
            Value::Object(fields) => fields.iter().for_each(|(key, value)| leaves(value, &format!("{path}/{key}"), found)),
            _ => found.push(path.to_owned()),
        }
    }

    #[test]
    fn every_field_of_the_question_counts() {
        let (mut paths, base) = (Vec::new(), whole());
        leaves(&base, "", &mut paths);
        // If a field is added to the spec, it belongs into `whole` (or, like the dry run and remedies, is none of the question).
        let schema = serde_json::to_value(schemars::schema_for!(MigrationForecastSpec)).unwrap();
        let fields: Vec<_> = schema["properties"]
            .as_object()
            .unwrap()
            .keys()
            .filter(|field| !["dryRun", "remedies"].contains(&field.as_str()))
            .collect();
        assert!(fields.iter().all(|field| base.get(field.as_str()).is_some()), "{fields:?}");

        let mut seen = std::collections::BTreeSet::from([read(base.clone()).fingerprint()]);
        for path in paths {
            let mut other = base.clone();
            let leaf = other.pointer_mut(&path).unwrap();
            *leaf = match leaf.clone() {
                Value::Bool(value) => json!(!value),
                Value::Number(number) => json!(number.as_f64().unwrap() + 1.0),
                Value::String(text) if text == "PredictionPolicy" => json!("Unlimited"),
                Value::String(text) if text == "PostCopy" => json!("Pause"),
                Value::String(text) => json!(format!("1{text}")),
                other => unreachable!("{other}"),
            };
            assert!(seen.insert(read(other).fingerprint()), "{path} does not change the fingerprint");
        }
    }

    /// The same fields, declared in another order.
    fn shuffled(value: &Value, order: &[usize]) -> String {
        let Value::Object(fields) = value else { return value.to_string() };
        let mut entries: Vec<_> = fields.iter().collect();
        for (at, swap) in order.iter().enumerate() {
            let (a, b) = (at % entries.len().max(1), swap % entries.len().max(1));
            if !entries.is_empty() {
                entries.swap(a, b);
            }
        }
        let text: Vec<_> = entries.iter().map(|(key, value)| format!("{}: {}", json!(key), shuffled(value, order))).collect();
        format!("{{{}}}", text.join(", "))
    }

    fn some_fields(mask: u32) -> Value {
        let optional =
            ["timeBudget", "sla", "costWeights", "host", "policy", "whenBudgetEnds", "autoConverge", "paused", "outsideModel"];
        let mut fields: Map<String, Value> = whole().as_object().unwrap().clone();
        optional.iter().enumerate().filter(|(at, _)| mask >> at & 1 == 0).for_each(|(_, field)| drop(fields.remove(*field)));
        Value::Object(fields)
    }

    proptest! {
        #[test]
        fn neither_a_dry_run_nor_the_order_of_fields_counts(
            mask in 0_u32..512, order in prop::collection::vec(0_usize..20, 0..20), id in "[a-z0-9]{1,20}", seconds in 1_u64..1000, channels in prop::option::of(1_u64..256)
        ) {
            let plain = some_fields(mask);
            let fingerprint = read(plain.clone()).fingerprint();
            prop_assert_eq!(&serde_json::from_str::<MigrationForecastSpec>(&shuffled(&plain, &order)).unwrap().fingerprint(), &fingerprint);

            let mut asked = plain.clone();
            asked["dryRun"] = json!({ "id": id, "deadline": format!("{seconds}s"), "channels": channels });
            prop_assert_eq!(&read(asked.clone()).remedies_fingerprint(), &fingerprint);
            asked["remedies"] = json!([{ "type": "TimeBudget", "maxCompletionTimeoutPerGiB": seconds }, { "type": "PostCopy" }]);
            prop_assert_eq!(&read(asked.clone()).fingerprint(), &fingerprint);
            prop_assert!(read(asked).remedies_fingerprint() != fingerprint);
            prop_assert!(fingerprint.len() == 16 && fingerprint.bytes().all(|byte| byte.is_ascii_hexdigit()));
        }

        #[test]
        fn other_questions_have_other_fingerprints(a in 0_u32..512, b in 0_u32..512, node in "[a-z]{1,8}", pod in "[a-z]{1,8}") {
            let of = |mask: u32, node: &str, pod: &str| {
                let mut value = some_fields(mask);
                (value["nodeName"], value["podUID"]) = (json!(node), json!(pod));
                read(value).fingerprint()
            };
            prop_assert_eq!(of(a, "n", "u") == of(b, "n", "u"), a == b);
            prop_assert_eq!(of(a, &node, &pod) == of(a, &pod, &node), node == pod, "fields do not run into each other");
        }
    }

    #[test]
    fn an_answer_counts_for_the_question_it_names() {
        let mut object = MigrationForecast::new("vm", read(whole()));
        assert_eq!(object.answer(), None);
        object.status = Some(MigrationForecastStatus::default());
        assert_eq!(object.answer(), None, "a status without an answer");
        object.status.as_mut().unwrap().question = Some(object.spec.fingerprint());
        assert!(object.answer().is_some());

        object.metadata.generation = Some(99);
        object.spec.dry_run = Some(super::super::dry_run::DryRun { id: "by-hand".into(), ..Default::default() });
        assert!(object.answer().is_some(), "asking for a dry run does not outdate the answer");
        let asked = object.spec.clone();
        object.spec.bandwidth = super::super::scalar::Quantity("1Gi".into());
        assert!(object.answer().is_none());
        assert!(object.answer_to(&asked).is_some(), "it is the answer to that question still");
    }
}
