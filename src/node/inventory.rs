//! Lists of what the node has: its disks page by page, their images, and the specifications to make the disks again.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::disk::{Disk, State};
use super::disks::Disks;
use super::error::{Code, Failure};
use super::id::DiskId;
use super::spec::Content;
use crate::engine::stats::DiskCell;

/// Returns the disks that have all `labels`, in the order of their ids: at most `limit` of those after the id `after`.
/// `next` of the answer is `after` for the next page.
pub fn page(
    disks: &Disks,
    labels: &[(String, String)],
    after: Option<&str>,
    limit: usize,
) -> Value {
    let wanted = |disk: &Disk| {
        let Some(entry) = disk.entry() else {
            return labels.is_empty();
        };
        let has = |(key, value): &(String, String)| entry.spec.labels.get(key) == Some(value);
        labels.iter().all(has)
    };
    let all = disks.all().into_iter();
    let mut found = all
        .filter(|disk| after.is_none_or(|after| disk.id().as_str() > after))
        .filter(|disk| wanted(disk))
        .peekable();
    let page: Vec<_> = found.by_ref().take(limit).collect();
    let next = found.peek().and_then(|_| page.last()).map(|disk| disk.id());
    let next = json!(next);
    let views: Vec<_> = page.iter().map(|disk| disks.view(disk)).collect();
    json!({ "disks": views, "next": next })
}

/// Returns the specification of each disk, from which another node makes the same disks. A fork is specified by its
/// layers, so that the order does not matter.
pub fn config(disks: &Disks) -> Value {
    let (mut known, mut damaged) = (Vec::new(), Vec::new());
    for disk in disks.all() {
        match disk.entry() {
            Some(entry) => {
                let spec = entry.spec.with_content(&entry.content);
                known.push(json!({ "id": entry.id, "spec": spec }));
            }
            None => damaged.push(disk.id().clone()),
        }
    }
    json!({ "disks": known, "damaged": damaged })
}

/// An image, and the disks that are made of it.
struct Users {
    content: Content,
    disks: Vec<DiskId>,
    /// Bytes of its tables, as the process of one of the disks reports them.
    table_bytes: u64,
}

impl Users {
    fn describe(&self, key: &str) -> Value {
        json!({
            "key": key,
            "content": self.content,
            "disks": self.disks,
            "table_bytes": self.table_bytes,
        })
    }
}

fn users(disks: &Disks) -> BTreeMap<String, Users> {
    let mut images = BTreeMap::new();
    for disk in disks.all() {
        let Some(entry) = disk.entry() else { continue };
        let users = images.entry(entry.content.key()).or_insert_with(|| Users {
            content: entry.content.clone(),
            disks: Vec::new(),
            table_bytes: 0,
        });
        users.disks.push(entry.id);
        if disk.state() == State::Listening {
            let bytes = disks.figures(&disk).disk(DiskCell::TableBytes);
            users.table_bytes = users.table_bytes.max(bytes);
        }
    }
    images
}

/// Returns the images that disks are made of, in the order of their keys.
pub fn images(disks: &Disks) -> Value {
    let users = users(disks);
    let images = users.iter().map(|(key, users)| users.describe(key));
    json!({ "images": images.collect::<Vec<_>>() })
}

/// Returns one image, with its layers as a process reports them; null while no disk of the image is served.
///
/// # Errors
/// [`Code::NotFound`] if no disk is made of it.
pub async fn image(disks: &Disks, key: &str) -> Result<Value, Failure> {
    let users = users(disks).remove(key);
    let users = users.ok_or_else(|| {
        let text = format!("no disk is made of an image {key:?}; GET /images lists the images");
        Failure::new(Code::NotFound, text)
    })?;
    let mut layers = Value::Null;
    for id in &users.disks {
        // A process that ends or does not answer has no layers to report; another may have.
        if let Ok(mut reported) = disks.image(id).await {
            layers = reported["layers"].take();
            break;
        }
    }
    let mut description = users.describe(key);
    description["layers"] = layers;
    Ok(description)
}
