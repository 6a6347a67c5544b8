"""A newcomer's file: modules as they are written elsewhere, of several libraries' contracts.

Stand-ins of the same contract: batches, outputs and steps are those of the libraries named; the
networks are small. It is loaded as a file of its own, from a folder outside the package.
"""

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytorch_lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset


class Rows(Dataset[Any]):
    """Samples in a list, as mappings or tuples."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def loader(rows: list[Any]) -> DataLoader[Any]:
    """Serve batches of four."""
    return DataLoader(Rows(rows), batch_size=4)


def images(count: int = 12) -> Tensor:
    """Draw images `(count, 3, 8, 8)`."""
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(outputs: int) -> nn.Sequential:
    """Make a small network for images."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 16),
        nn.ReLU(),
        nn.Linear(16, outputs),
    )


class ClassificationTask(pl.LightningModule):
    """torchgeo: batches of `image` and `label`, a model beside a criterion."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = network(num_classes)
        self.criterion: nn.Module = nn.CrossEntropyLoss()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        x, y = batch["image"], batch["label"]
        loss: Tensor = self.criterion(self(x), y)
        self.log("train_loss", loss, batch_size=x.shape[0])
        return loss

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch["image"], batch["label"]
        self.log("test_loss", self.criterion(self(x), y), batch_size=x.shape[0])

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        y_hat: Tensor = self(batch["image"]).softmax(dim=-1)
        return y_hat

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}}


def scenes() -> DataLoader[Any]:
    """Serve images with labels of four classes."""
    return loader([{"image": x, "label": i % 4, "crs": "EPSG"} for i, x in enumerate(images())])


class NamespaceTask(pytorch_lightning.LightningModule):
    """An own module that was written with `import pytorch_lightning as pl`."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.ReLU())
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits: Tensor = self(batch[0])
        return logits

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def pairs() -> DataLoader[Any]:
    """Serve images and labels in tuples."""
    return loader([(x, i % 4) for i, x in enumerate(images())])


@dataclass
class SequenceClassifierOutput:
    """transformers: what a classifier returns."""

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class Classifier(nn.Module):
    """transformers: takes arguments by name, masks what is padded."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(20, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.pooler = nn.Linear(16, 16)
        self.classifier = nn.Linear(16, 3)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        hidden = self.embeddings(input_ids)
        states = self.encoder(hidden, src_key_padding_mask=attention_mask == 0)
        logits = self.classifier(self.pooler(states[:, 0]).tanh())
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss, logits, (hidden, states))


class TextModule(pl.LightningModule):
    """transformers under Lightning: the batch is spread over the arguments of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Classifier()

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self(**batch).loss
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        outputs = self(**batch)
        accuracy = (outputs.logits.argmax(1) == batch["labels"]).float().mean()
        self.log_dict({"test_loss": outputs.loss, "test_acc": accuracy})

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits: Tensor = self(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
        return logits

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def texts() -> DataLoader[Any]:
    """Serve tokens, of which the last may be padding."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for index in range(12):
        mask = torch.ones(6, dtype=torch.long)
        mask[4 + index % 3 :] = 0
        ids = torch.randint(1, 20, (6,), generator=draw) * mask
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": index % 3})
    return loader(rows)


class TwoHeads(pl.LightningModule):
    """An own module of two heads: a class, and a value beside it, in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU())
        self.kind = nn.Linear(16, 4)
        self.size = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x)
        return self.kind(features), self.size(features)

    def loss(self, batch: Any) -> Tensor:
        x, (kind, size) = batch
        logits, values = self(x)
        return F.cross_entropy(logits, kind) + F.mse_loss(values[:, 0], size)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def two_targets() -> DataLoader[Any]:
    """Serve images, each with a class and a value."""
    return loader([(x, (i % 4, torch.tensor(float(i)))) for i, x in enumerate(images())])


class MultiLabelTask(ClassificationTask):
    """torchgeo, `task='multilabel'`: several labels may be there at once."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__(num_classes)
        self.criterion = nn.BCEWithLogitsLoss()

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        y_hat: Tensor = self(batch["image"]).sigmoid()
        return y_hat


def tagged() -> DataLoader[Any]:
    """Serve images with five labels, each there or not."""
    tags = [torch.tensor([float((i + n) % 3 == 0) for n in range(5)]) for i in range(12)]
    return loader([{"image": x, "label": y} for x, y in zip(images(), tags, strict=True)])


class SegmentationTask(ClassificationTask):
    """torchgeo: batches of `image` and `mask`, a class of which the loss ignores."""

    def __init__(self, num_classes: int = 3, ignore_index: int = 255) -> None:
        super().__init__(num_classes)
        self.model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, num_classes, 1),
        )
        self.criterion = nn.CrossEntropyLoss(ignore_index=ignore_index)

    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return super().training_step({**batch, "label": batch["mask"]}, batch_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().test_step({**batch, "label": batch["mask"]}, batch_idx)


def masks() -> DataLoader[Any]:
    """Serve images with maps of three classes, of which a part is not known."""
    rows = []
    for index, image in enumerate(images()):
        mask = (image[0] > 0).long() + (image[1] > 0).long()
        mask[: 1 + index % 3] = 255
        rows.append({"image": image, "mask": mask})
    return loader(rows)


class PixelwiseRegressionTask(SegmentationTask):
    """torchgeo: a value for each pixel, predicted as maps of one channel."""

    def __init__(self, num_classes: int = 1, ignore_index: int = 255) -> None:
        super().__init__(num_classes, ignore_index)
        self.criterion = nn.MSELoss()

    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        x, y = batch["image"], batch["mask"]
        y_hat = self(x)
        if y_hat.ndim != y.ndim:
            y = y.unsqueeze(dim=1)
        loss: Tensor = self.criterion(y_hat, y)
        return loss

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test_loss", self.training_step(batch, batch_idx), batch_size=len(batch["mask"]))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        y_hat: Tensor = self(batch["image"])
        return y_hat


def heights() -> DataLoader[Any]:
    """Serve images with a map of values each."""
    return loader([{"image": x, "mask": x.mean(0)} for x in images()])


class Forecaster(pl.LightningModule):
    """An LSTM that forecasts the next steps of several quantities, `(B, T, C)`."""

    def __init__(self, steps: int = 3, quantities: int = 2) -> None:
        super().__init__()
        self.shape = steps, quantities
        self.lstm = nn.LSTM(quantities, 16, batch_first=True)
        self.hidden = nn.Linear(16, 16)
        self.head = nn.Linear(16, steps * quantities)

    def forward(self, x: Tensor) -> Tensor:
        _, (state, _) = self.lstm(x)
        found: Tensor = self.head(self.hidden(state[-1]).relu())
        return found.view(-1, *self.shape)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self(x), y)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", F.mse_loss(self(x), y))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        found: Tensor = self(batch[0])
        return found

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def series() -> DataLoader[Any]:
    """Serve eleven steps of two quantities, of which the last three are to be forecast."""
    draw = torch.Generator().manual_seed(0)
    walks = torch.randn(12, 11, 2, generator=draw).cumsum(1)
    return loader([(walk[:8], walk[8:]) for walk in walks])
