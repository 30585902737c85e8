// Pictures from files: as they are, or smaller where a camera made them larger than any model looks at.

const LONGEST = 2048, LARGEST = 4e6;
const KINDS = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];

export async function fileToPicture(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
  const asItIs = scale === 1 && file.size <= LARGEST && KINDS.includes(file.type);
  const url = asItIs ? await read(file) : drawn(bitmap, scale);
  bitmap.close();
  return { url, name: file.name };
}

function drawn(bitmap, scale) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.92);
}

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
