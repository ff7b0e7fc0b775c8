"""Documents of a data set that is streamed from the Hugging Face hub, without keeping a copy."""

from __future__ import annotations

from transformers_backend.data.sources import BUILT_IN_SOURCE, Order, StreamedSource, import_datasets


def open_stream(
    dataset: str, configuration: str | None, split: str, revision: str | None, text_column: str, order: Order
) -> StreamedSource:
    name = f'dataset = "{dataset}"'
    datasets = import_datasets(name)
    if int(datasets.__version__.partition(".")[0]) < 5:
        raise ImportError(
            f"{name}: streaming needs datasets >= 5, found {datasets.__version__}: pip install -U datasets"
        )
    try:
        records = datasets.load_dataset(dataset, name=configuration, split=split, revision=revision, streaming=True)
    except (OSError, ValueError) as error:  # not found or no connection; unknown configuration or split
        raise ValueError(
            f'{name} (dataset_name = {configuration!r}, dataset_split = "{split}", dataset_revision = {revision!r}): '
            f'must be "{BUILT_IN_SOURCE}" or a dataset of the Hugging Face hub, and could not be opened. Check these '
            f"keys and the connection, or give local files in dataset_path. ({type(error).__name__}: {error})"
        ) from error
    fingerprint = {"dataset": dataset, "configuration": configuration, "split": split, "revision": revision}
    return StreamedSource(name, records, text_column, order, fingerprint)
