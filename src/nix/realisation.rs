//! Realisations: the store path of each output of a content-addressed derivation (Nix manual,
//! "Build trace").
//!
//! There are two formats, and each version of Nix reads and stores only its own. Nix 2.4 to 2.34
//! identify an output by a hash that is part of no store path, Nix 2.35 and later by the
//! derivation's path.

use super::{Malformed, Signature, StorePath};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

const WHAT: &str = "realisation";

/// An output of a derivation, in the notation of the requesting Nix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DrvOutput {
    /// The derivation.
    pub derivation: DerivationId,
    /// The name of the output, mostly `out`. It has the characters and length of store path names.
    pub output: String,
}

/// The identifier of a derivation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DerivationId {
    /// Nix 2.4 to 2.34: `sha256:` and 64 lower-case hexadecimal digits, the derivation's "hash
    /// modulo".
    Hash(String),
    /// Nix 2.35 and later: the derivation's store path.
    Path(StorePath),
}

impl DrvOutput {
    /// Parses `<hash>!<output>`, as in `/realisations/<hash>!<output>.doi`.
    ///
    /// # Errors
    /// No `!`, a malformed output name, or a hash that is not `sha256:` and 64 hexadecimal digits
    /// (unsupported).
    pub fn parse_id(id: &str) -> Result<Self, Malformed> {
        let (hash, output) = id.split_once('!').ok_or(Malformed::new(WHAT, "ID without !"))?;
        let digits = hash.strip_prefix("sha256:").unwrap_or_default();
        if digits.len() != 64 || !digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(Malformed::unsupported(
                WHAT,
                "derivation is not named by 64 hexadecimal digits of SHA-256",
            ));
        }
        Ok(DrvOutput {
            derivation: DerivationId::Hash(hash.to_owned()),
            output: output_name(output)?,
        })
    }

    /// Parses the two components of `/build-trace-v2/<derivation>/<output>.doi`.
    ///
    /// # Errors
    /// `derivation` is no derivation's base name, or `output` is no output name.
    pub fn parse_path(derivation: &str, output: &str) -> Result<Self, Malformed> {
        let path = StorePath::parse(derivation)?;
        if !path.is_derivation() {
            return Err(Malformed::new(WHAT, "not of a derivation"));
        }
        Ok(DrvOutput { derivation: DerivationId::Path(path), output: output_name(output)? })
    }

    /// Returns the URL path in a binary cache, relative to the cache's root. Names may have a
    /// question mark, which would begin a query.
    pub fn url_path(&self) -> String {
        let path = match &self.derivation {
            DerivationId::Hash(_) => format!("realisations/{self}.doi"),
            DerivationId::Path(path) => format!("build-trace-v2/{path}/{}.doi", self.output),
        };
        path.replace('?', "%3F")
    }
}

/// Writes the notation of Nix: `<hash>!<output>` or `<derivation>^<output>`.
impl fmt::Display for DrvOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.derivation {
            DerivationId::Hash(hash) => write!(f, "{hash}!{}", self.output),
            DerivationId::Path(path) => write!(f, "{path}^{}", self.output),
        }
    }
}

fn output_name(text: &str) -> Result<String, Malformed> {
    let legal = |b: u8| b.is_ascii_alphanumeric() || b"+-._?=".contains(&b);
    if text.is_empty() || text.len() > StorePath::MAX_NAME_LEN || !text.bytes().all(legal) {
        return Err(Malformed::new(WHAT, "not the name of an output"));
    }
    Ok(text.to_owned())
}

/// The store path that an output was built as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Realisation {
    /// The output.
    pub id: DrvOutput,
    /// The store path of the output.
    pub out_path: StorePath,
    /// The outputs that it was built from and their store paths, which Nix up to 2.32 records.
    /// Signatures cover them.
    pub dependencies: BTreeMap<String, StorePath>,
    /// The signatures that are well formed.
    pub signatures: Vec<Signature>,
}

/// The body of `/realisations/….doi`. Nix signs it without `signatures`, as `nlohmann::json` prints
/// it: no white space, and keys in byte order. The order of the fields here is that order.
#[derive(Serialize, Deserialize)]
struct RealisationBody {
    #[serde(rename = "dependentRealisations", default)]
    dependencies: BTreeMap<String, String>,
    id: String,
    #[serde(rename = "outPath")]
    out_path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    signatures: Option<Vec<AnySignature>>,
}

/// The body of `/build-trace-v2/….doi`.
#[derive(Serialize, Deserialize)]
struct BuildTraceBody {
    #[serde(rename = "outPath")]
    out_path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    signatures: Option<Vec<AnySignature>>,
}

/// The text that Nix 2.35 and later sign.
#[derive(Serialize)]
struct BuildTraceFingerprint {
    key: BuildTraceKey,
    value: BuildTraceBody,
}

#[derive(Serialize)]
struct BuildTraceKey {
    #[serde(rename = "drvPath")]
    derivation: String,
    #[serde(rename = "outputName")]
    output: String,
}

/// A signature in either of the two notations that Nix writes.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum AnySignature {
    Text(String),
    Parts {
        #[serde(rename = "keyName")]
        name: String,
        sig: String,
    },
}

impl AnySignature {
    fn parse(&self) -> Option<Signature> {
        match self {
            AnySignature::Text(text) => Signature::parse(text).ok(),
            AnySignature::Parts { name, sig } => Signature::parse(&format!("{name}:{sig}")).ok(),
        }
    }
}

impl Realisation {
    /// The most bytes in a realisation; [`Realisation::parse`] refuses larger ones. A realisation
    /// has 250 bytes, and 140 more for each output that it was built from.
    pub const MAX_LEN: usize = 64 * 1024;

    /// Parses the body that a cache serves for `id`. Malformed signatures are dropped.
    ///
    /// # Errors
    /// Not the JSON that Nix writes, for another output, or larger than [`MAX_LEN`](Self::MAX_LEN)
    /// (unsupported).
    pub fn parse(bytes: &[u8], id: &DrvOutput) -> Result<Self, Malformed> {
        if bytes.len() > Self::MAX_LEN {
            return Err(Malformed::unsupported(WHAT, "larger than 64 KiB"));
        }
        let not_json = |_| Malformed::new(WHAT, "not the JSON of a realisation");
        let (out_path, dependencies, signatures) = match &id.derivation {
            DerivationId::Hash(_) => {
                let RealisationBody { id: given_id, out_path, dependencies, signatures } =
                    serde_json::from_slice(bytes).map_err(not_json)?;
                if given_id != id.to_string() {
                    return Err(Malformed::new(WHAT, "of another output"));
                }
                (out_path, dependencies, signatures)
            }
            DerivationId::Path(_) => {
                let BuildTraceBody { out_path, signatures } =
                    serde_json::from_slice(bytes).map_err(not_json)?;
                (out_path, BTreeMap::new(), signatures)
            }
        };
        let dependency = |(id, path): (String, String)| {
            DrvOutput::parse_id(&id)?;
            Ok((id, StorePath::parse(&path)?))
        };
        Ok(Realisation {
            id: id.clone(),
            out_path: StorePath::parse(&out_path)?,
            dependencies: dependencies.into_iter().map(dependency).collect::<Result<_, _>>()?,
            signatures: signatures.iter().flatten().filter_map(AnySignature::parse).collect(),
        })
    }

    /// Returns the text that Nix signs, in the format of `id`.
    pub fn fingerprint(&self) -> String {
        match &self.id.derivation {
            DerivationId::Hash(_) => json(&self.keyed(None)),
            DerivationId::Path(path) => {
                let key = BuildTraceKey {
                    derivation: path.base_name().to_owned(),
                    output: self.id.output.clone(),
                };
                json(&BuildTraceFingerprint { key, value: self.unkeyed(None) })
            }
        }
    }

    /// Returns the body as Nix writes it. `signature` is added if the realisation does not have it.
    pub fn print(&self, signature: Option<&Signature>) -> String {
        let added = signature.filter(|signature| !self.signatures.contains(signature));
        let signatures = self.signatures.iter().chain(added).map(Signature::to_string);
        match &self.id.derivation {
            DerivationId::Hash(_) => {
                json(&self.keyed(Some(signatures.map(AnySignature::Text).collect())))
            }
            DerivationId::Path(_) => {
                let parts = |text: String| {
                    let (name, sig) = text.split_once(':').expect("a signature has a colon");
                    AnySignature::Parts { name: name.to_owned(), sig: sig.to_owned() }
                };
                json(&self.unkeyed(Some(signatures.map(parts).collect())))
            }
        }
    }

    fn keyed(&self, signatures: Option<Vec<AnySignature>>) -> RealisationBody {
        let dependency =
            |(id, path): (&String, &StorePath)| (id.clone(), path.base_name().to_owned());
        RealisationBody {
            dependencies: self.dependencies.iter().map(dependency).collect(),
            id: self.id.to_string(),
            out_path: self.out_path.base_name().to_owned(),
            signatures,
        }
    }

    fn unkeyed(&self, signatures: Option<Vec<AnySignature>>) -> BuildTraceBody {
        BuildTraceBody { out_path: self.out_path.base_name().to_owned(), signatures }
    }
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("text and maps of text are JSON")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::PublicKey;

    // Written by Nix 2.8.0 (`nix copy --to file://…` with `secret-key-files`).
    const ID: &str = "sha256:b51939d1809384f804e7749b9dff008202e7d9bcb6eb24a4f8623e7a7c1bf55f!out";
    const BODY: &str = r#"{"dependentRealisations":{},"id":"sha256:b51939d1809384f804e7749b9dff008202e7d9bcb6eb24a4f8623e7a7c1bf55f!out","outPath":"6a5mfmakknzr8h0dfwc1030kg9kghw9i-floating-output","signatures":["k-1:KwLHeNEGjKLtcJi5gsFHF5XUQvqWVzEfctmdkNX4EBWx5ZivyUftbQOtRxFmdAjGE/tir+z4uJGuI/CVJdWzDA=="]}"#;
    const KEY: &str = "k-1:e8oodhTXJzBulmC+GWXgD1KnX0LBJayODSaVQDxcODc=";
    const DERIVATION: &str = "yb1w2zr3mmvsqzl7mmj9ia1ld4ayl02s-floating-output.drv";

    #[test]
    fn realisation_of_nix_verifies_and_round_trips() {
        let id = DrvOutput::parse_id(ID).unwrap();
        assert_eq!(id.url_path(), format!("realisations/{ID}.doi"));
        let realisation = Realisation::parse(BODY.as_bytes(), &id).unwrap();
        assert_eq!(realisation.out_path.name(), "floating-output");
        let key = PublicKey::parse(KEY).unwrap();
        assert!(key.verify(realisation.fingerprint().as_bytes(), &realisation.signatures[0]));
        assert_eq!(realisation.print(None), BODY);
        assert_eq!(realisation.print(Some(&realisation.signatures[0])), BODY);
        // A signature covers every field except the signatures.
        let other = StorePath::parse(DERIVATION).unwrap();
        let dependency = (ID.to_owned(), other.clone());
        for forged in [
            Realisation { out_path: other, ..realisation.clone() },
            Realisation { dependencies: [dependency].into(), ..realisation.clone() },
            Realisation {
                id: DrvOutput::parse_id(&ID.replace("!out", "!dev")).unwrap(),
                ..realisation.clone()
            },
        ] {
            assert!(!key.verify(forged.fingerprint().as_bytes(), &realisation.signatures[0]));
            let printed = forged.print(None);
            assert_eq!(Realisation::parse(printed.as_bytes(), &forged.id), Ok(forged));
        }
    }

    #[test]
    fn build_trace_parses_both_signature_notations() {
        let id = DrvOutput::parse_path(DERIVATION, "out").unwrap();
        assert_eq!(id.url_path(), format!("build-trace-v2/{DERIVATION}/out.doi"));
        // A question mark would begin the query of the URL.
        let odd = DERIVATION.replace(".drv", "?.drv");
        let url_path = DrvOutput::parse_path(&odd, "out").unwrap().url_path();
        assert!(!url_path.contains('?') && url_path.contains("%3F.drv/out.doi"), "{url_path}");
        let sig = BODY.split("k-1:").nth(1).unwrap().trim_end_matches("\"]}");
        let old = format!(
            r#"{{"outPath":"6a5mfmakknzr8h0dfwc1030kg9kghw9i-floating-output","signatures":["k-1:{sig}"]}}"#
        );
        let new = old
            .replace(&format!(r#""k-1:{sig}""#), &format!(r#"{{"keyName":"k-1","sig":"{sig}"}}"#));
        for text in [&old, &new] {
            let realisation = Realisation::parse(text.as_bytes(), &id).unwrap();
            assert_eq!(realisation.print(None), new);
            assert_eq!(
                realisation.fingerprint(),
                format!(
                    r#"{{"key":{{"drvPath":"{DERIVATION}","outputName":"out"}},"value":{{"outPath":"{}"}}}}"#,
                    realisation.out_path
                )
            );
        }
    }

    #[test]
    fn malformed_realisation_is_refused() {
        let id = DrvOutput::parse_id(ID).unwrap();
        for end in 0..BODY.len() {
            assert!(Realisation::parse(&BODY.as_bytes()[..end], &id).is_err());
        }
        for (from, to) in [
            ("!out", "!dev"),
            ("6a5mf", "../mf"),
            (r#""dependentRealisations":{}"#, r#""dependentRealisations":{"x":"y"}"#),
            (r#""dependentRealisations":{}"#, r#""dependentRealisations":[]"#),
            (r#""outPath""#, r#""outpath""#),
            (r#"["k-1"#, r#"[7,"k-1"#),
        ] {
            assert!(
                Realisation::parse(BODY.replacen(from, to, 1).as_bytes(), &id).is_err(),
                "{from} -> {to}"
            );
        }
        let padded = format!("{BODY}{}", " ".repeat(Realisation::MAX_LEN));
        assert!(Realisation::parse(padded.as_bytes(), &id).unwrap_err().is_unsupported);
        assert!(
            Realisation::parse(BODY.replace("k-1:", "").as_bytes(), &id)
                .unwrap()
                .signatures
                .is_empty()
        );
        for id in [
            "",
            "!",
            "sha256:00!out",
            "sha256:!out",
            &ID[7..],
            &ID.to_uppercase(),
            &ID.replace("!out", "!a/b"),
        ] {
            assert!(DrvOutput::parse_id(id).is_err(), "{id}");
        }
        assert!(DrvOutput::parse_path(DERIVATION.trim_end_matches(".drv"), "out").is_err());
        assert!(DrvOutput::parse_path(DERIVATION, "").is_err());
    }
}
